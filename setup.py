"""Puts the examples into the wheel, as ``fedft/examples``; all else stands in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class WithExamples(build_py):
    """``build_py`` that copies what ``fedft init`` hands out. An editable install reads them in place."""

    def _examples(self) -> list[tuple[Path, Path]]:
        found = runpy.run_path(str(ROOT / "fedft" / "shipped.py"))["shipped"](ROOT / "examples")
        target = Path(self.build_lib, "fedft")
        pairs = [(path, target / path.relative_to(ROOT)) for path in found]
        if not pairs:
            raise FileNotFoundError(
                f"{ROOT / 'examples'} has no examples, which belong into the wheel"
            )
        return pairs

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in self._examples():
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        ours = [] if self.editable_mode else [str(target) for _, target in self._examples()]
        return super().get_outputs(include_bytecode) + ours


setup(cmdclass={"build_py": WithExamples})
