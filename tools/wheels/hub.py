"""Lays out the built package as kernels of Hugging Face's library `kernels`.

    python -m tools.wheels.hub --output-dir build/hub

The folder gets one variant for the CPU and one for each CUDA library, such as
build/torch-stable-abi210-cu130-x86_64-linux, with the libraries, the Python modules of the ops and metadata.json.
`kernels.get_local_kernel` loads it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Kernels may import themselves relatively only, because the Hub gives each build a name of its own. Modules that
#: import the installed package are adapters and commands, which no op needs.
NEEDS_PACKAGE = re.compile(r"^\s*(import|from) retinanet_ops\b", re.MULTILINE)


#: CARD.md begins with these lines, which tell the Hub that a repository is a kernel.
CARD_BEGIN = "---\nlibrary_name: kernels\n"


class HubError(Exception):
    """The package cannot be laid out. The message states the reason and the remedy."""


def _copy_modules(package: Path, variant: Path) -> None:
    """Copy the Python modules that import nothing but each other and torch."""
    for path in (*package.glob("*.py"), *package.glob("reference/*.py")):
        if path.name != "__main__.py" and not NEEDS_PACKAGE.search(path.read_text(encoding="utf-8")):
            target = variant / path.relative_to(package)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def _write_variant(package: Path, variant: Path, backend: str, libraries: list[str], info: dict[str, object]) -> None:
    """Write one variant with these libraries and this build information."""
    shutil.rmtree(variant, ignore_errors=True)
    variant.mkdir(parents=True)
    _copy_modules(package, variant)
    digest = hashlib.sha256()
    for name in libraries:
        shutil.copy(package / name, variant / name)
        digest.update((package / name).read_bytes())
    (variant / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")
    metadata = {
        "name": "retinanet-ops",
        "id": f"_retinanet_ops_{backend}_{digest.hexdigest()[:12]}",
        "version": 1,
        "license": "BSD-3-Clause",
        "python-depends": [],
        "backend": {"type": backend},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def write_kernels(package: Path, output_dir: Path) -> list[Path]:
    """Lay out a built package.

    Args:
        package: The folder of `retinanet_ops` with its libraries and `_build_info.json`.
        output_dir: The repository to write. Its folder `build` gets the variants; those of the same name are replaced.

    Returns:
        The folders of the variants, that of the CPU first.

    Raises:
        HubError: The package is not built, or the README.md of `output_dir` is not that of a kernel.
    """
    if not (package / "_build_info.json").exists():
        raise HubError(f"{package} holds no built kernels; build them first, for example with `make venv`")
    readme = output_dir / "README.md"
    if readme.exists() and not readme.read_text(encoding="utf-8").startswith(CARD_BEGIN):
        raise HubError(
            f"{readme} is not the card of a kernel and would be overwritten; choose another --output-dir, or delete it"
        )
    info = json.loads((package / "_build_info.json").read_text())
    stable = f"torch-stable-abi{info['torch_target'].replace('.', '')}"
    system = f"{platform.machine()}-{sys.platform}"
    cpu_only = {**info, "cuda_builds": {}, "cuda_omitted": "this is the CPU variant of a kernel"}
    variants = [output_dir / "build" / f"{stable}-cpu-{system}"]
    _write_variant(package, variants[0], "cpu", ["_C.so"], cpu_only)
    for major, cuda in info["cuda_builds"].items():
        variants.append(output_dir / "build" / f"{stable}-cu{cuda['version'].replace('.', '')}-{system}")
        one = {**info, "cuda_builds": {major: cuda}}
        _write_variant(package, variants[-1], "cuda", ["_C.so", f"_cuda{major}.so"], one)
    shutil.copy(ROOT / "CARD.md", readme)
    return variants


def main() -> int:
    """Lay out the package of this source tree and print the folders of the variants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="the repository to write")
    parser.add_argument("--package", type=Path, default=ROOT / "retinanet_ops", help="the built package")
    arguments = parser.parse_args()
    try:
        for variant in write_kernels(arguments.package, arguments.output_dir):
            print(variant)
    except (HubError, OSError) as error:
        print(f"wheels.hub: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
