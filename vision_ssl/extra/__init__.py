"""What not every user needs: nothing imports it but the command line, when a command asks for it."""
