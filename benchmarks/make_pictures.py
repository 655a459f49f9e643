"""Make the pictures of the documentation, in docs/images, from the folder that `make demo` has written.

- `routing_report.png`: the top of the page that `deepseekmoe report` makes of the demo's model, as a browser shows it.
  If no browser is installed, it shows the plots of that page, one below the other.
- `loss.png` and `expert_load.png` of the demo, and `balancing.png` of benchmarks/balancing.py.

    python benchmarks/make_pictures.py [--demo runs/demo] [--data text.txt]
"""

import argparse
import base64
import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

from PIL import Image

ROOT = Path(__file__).parents[1]
IMAGES, BALANCING = ROOT / "docs" / "images", ROOT / "benchmarks" / "results" / "balancing.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
MODEL, PAGE = "my-moe", "routing_report.html"  # the page shows the name of the model
WIDTH, HEIGHT = 1200, 1850  # pixels of the screenshot: the facts, the load of every expert, the imbalance
MOST_BYTES = 200_000


def write_report(model: Path, data: Path | None, folder: Path) -> Path:
    """Run `deepseekmoe report` in a folder of its own, so that no path of this machine comes into the page."""
    (folder / MODEL).symlink_to(model.resolve(), target_is_directory=True)
    if data is None:
        data = folder / "python_language_reference.txt"
        data.write_text("\n\n".join(topics.values()), encoding="utf-8")
    command = [sys.executable, "-m", "modeling_deepseekmoe.cli", "report", MODEL, "--data", data.resolve()]
    subprocess.run([*map(str, command), "--output", PAGE, "--max-tokens", "8192"], check=True, cwd=folder)
    return folder / PAGE


def screenshot(browser: str, page: Path) -> Image.Image:
    """Show the page in a browser without a window, and take a picture of its top."""
    picture = page.with_suffix(".png")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={picture}", page.as_uri()]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return Image.open(picture).convert("RGB")


def plots_of(page: Path) -> Image.Image:
    """Put the first two plots of the page one below the other."""
    found = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page.read_text(encoding="utf-8"))
    plots = [Image.open(io.BytesIO(base64.b64decode(plot))).convert("RGB") for plot in found[:2]]
    width = max(plot.width for plot in plots)
    picture = Image.new("RGB", (width, sum(plot.height for plot in plots)), "white")
    top = 0
    for plot in plots:
        picture.paste(plot, ((width - plot.width) // 2, top))
        top += plot.height
    return picture


def make_routing_report(model: Path, data: Path | None, browser: str | None) -> Image.Image:
    """Make the page, and a picture of it."""
    with tempfile.TemporaryDirectory() as folder:
        page = write_report(model, data, Path(folder))
        return screenshot(browser, page) if browser else plots_of(page)


def check_size(picture: Path) -> None:
    """Print the size of a picture. Raise ValueError if it is too large for a page."""
    size = picture.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{picture} has {size:,} bytes: it may have {MOST_BYTES:,}.")
    print(f"{picture}: {size:,} bytes")


def main(arguments: Sequence[str] | None = None) -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / "runs" / "demo", help="the folder of the demo")
    parser.add_argument("--data", type=Path, help="text of the report; by default Python's language reference")
    options = parser.parse_args(arguments)
    IMAGES.mkdir(parents=True, exist_ok=True)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    print(f"Picture of the routing report: {browser or 'its plots, no browser is installed'}")
    report = make_routing_report(options.demo / "model", options.data, browser)
    report.save(IMAGES / "routing_report.png", optimize=True)
    for source in (options.demo / "loss.png", options.demo / "expert_load.png", BALANCING):
        shutil.copyfile(source, IMAGES / source.name)
    for picture in sorted(IMAGES.glob("*.png")):
        check_size(picture)


if __name__ == "__main__":
    main()
