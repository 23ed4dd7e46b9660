"""The C++ core under AddressSanitizer, UBSan and ThreadSanitizer: no reads past a tile, no races."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("g++")


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
# The first build takes fresh memory, full of NaN, for every buffer: the blocks that a thread keeps are longer
# than what is asked for and hide a read past the end. The second has the portable code of no x86 processor.
@pytest.mark.parametrize(
    ("sanitizers", "work", "define"),
    [
        pytest.param("address,undefined", "serial", "BSGAP_CHECK_BUFFERS", marks=pytest.mark.slow),
        ("thread", "threads", "BSGAP_PORTABLE"),
    ],
)
def test_core_is_clean(sanitizers: str, work: str, define: str, tmp_path: Path) -> None:
    driver = tmp_path / "driver"
    warnings = ["-Wall", "-Wextra", "-Wno-psabi", "-Werror"]
    options = ["-std=c++20", "-O1", "-g", "-pthread", "-fopenmp-simd", *warnings, f"-I{ROOT / 'csrc'}"]
    options += [
        f"-fsanitize={sanitizers}",
        "-fno-sanitize-recover=all",
        f"-D{define}",
        "-o",
        str(driver),
    ]
    command = [str(COMPILER), str(ROOT / "tests" / "sanitize_core.cpp"), *options]
    build = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in build.stderr and "san" in build.stderr:
        pytest.skip(f"g++ has no runtime for -fsanitize={sanitizers}")
    assert build.returncode == 0, build.stderr
    done = subprocess.run([str(driver), work], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Sanitizer" not in done.stderr
