"""Is one model better than another, or is it chance? Both are probed on the same images."""

import vision_ssl
from vision_ssl.report import paired_bootstrap


def main(source: str = "fashion-mnist-mini") -> None:
    """Print the linear probe of two packaged models on `source`, and the interval of their difference."""
    reports = {}
    for name in ("simclr_resnet18", "mae_vit_small"):
        reports[name] = vision_ssl.evaluate(vision_ssl.load(name), train=source, val=source)
        print(f"{name}: {reports[name]}")
    difference = paired_bootstrap(reports["simclr_resnet18"], reports["mae_vit_small"])
    print(f"simclr_resnet18 - mae_vit_small: {difference}")


if __name__ == "__main__":
    main()
