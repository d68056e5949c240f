"""What not every user needs. Only the command line and `Run` import from here, when they are asked to."""
