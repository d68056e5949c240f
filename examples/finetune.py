"""Fine-tune a packaged encoder with a new head, in a plain PyTorch loop."""

import torch
import torch.nn.functional as F

import vision_ssl


def main(source: str = "fashion-mnist-mini", steps: int = 60) -> float:
    """Train all layers on the training images of `source`; return the accuracy on the others, percent."""
    train = vision_ssl.open_images(source, size=64, require_labels=True)
    val = vision_ssl.open_images(source, size=64, split="val", require_labels=True)
    assert train.labels is not None  # a source without labels was refused
    assert val.labels is not None
    model = vision_ssl.load("simclr_resnet18", num_classes=len(train.classes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.05)

    model.train()
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(train), (64,), generator=generator)
        logits = model(model.preprocess.normalise(train.pixels[rows]))
        F.cross_entropy(logits, train.labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()

    model.eval()
    with torch.inference_mode():
        batches = [model(model.preprocess.normalise(pixels)) for pixels in val.pixels.split(250)]
    accuracy = 100 * (torch.cat(batches).argmax(dim=1) == val.labels).float().mean().item()
    print(f"accuracy after {steps} steps: {accuracy:.1f} %")
    return accuracy


if __name__ == "__main__":
    main()
