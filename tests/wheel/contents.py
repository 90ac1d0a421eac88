"""python tests/wheel/contents.py SDIST WHEEL: both hold what they should and nothing else.

Run in the repository, whose tracked files are what they should hold.
"""

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

FILES = {"CHANGELOG.md", "CITATION.cff", "CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md"}
FILES |= {"pyproject.toml", "setup.py"}
FOLDERS = ("trt_kernels/", "csrc/", "tests/csrc/")
# Nothing of torch, whose version is free, and nothing of CUDA, which a machine need not have.
LIBRARIES = {"c", "m", "gcc_s", "stdc++", "gomp", "pthread", "dl", "rt"}


def same(what, found, expected):
    found, expected = set(found), set(expected)
    if found != expected:
        lacks, more = sorted(expected - found), sorted(found - expected)
        sys.exit(f"{what}: lacks {lacks or 'nothing'}; should not hold {more or 'nothing'}")
    print(f"{what}: {len(found)} files, as it should")


def check_sdist(path, tracked):
    with tarfile.open(path) as archive:
        names = [m.name.split("/", 1)[1] for m in archive.getmembers() if m.isfile()]
    made = {"PKG-INFO", "setup.cfg"} | {n for n in names if n.startswith("trt_kernels.egg-info/")}
    same(path.name, names, made | {n for n in tracked if n in FILES or n.startswith(FOLDERS)})


def check_wheel(path, tracked):
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        extensions = [n for n in names if re.fullmatch(r"trt_kernels/_C\.[\w-]+\.so", n)]
        if len(extensions) != 1:
            sys.exit(f"{path.name}: got the extensions {extensions}, needs one")
        (info,) = {n.split("/")[0] for n in names if ".dist-info/" in n}
        made = ("METADATA", "WHEEL", "RECORD", "top_level.txt", "licenses/LICENSE")
        package = {n for n in tracked if n.startswith("trt_kernels/")}
        same(path.name, names, package | set(extensions) | {f"{info}/{n}" for n in made})
        metadata = archive.read(f"{info}/METADATA").decode()
        for line in ("License-Expression: MIT", "Requires-Python: >=3.10", "Requires-Dist: torch"):
            if not re.search(f"^{line}", metadata, re.MULTILINE):
                sys.exit(f"{path.name}: METADATA lacks {line!r}")
        library = archive.extract(extensions[0], folder)
        command = ["readelf", "-d", library]
        dynamic = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(?:lib)?([\w+-]+)\.so", dynamic)
    strangers = [n for n in needed if n not in LIBRARIES and not n.startswith("ld-linux")]
    if strangers or not needed:
        sys.exit(f"{path.name}: _C links {strangers or 'nothing'}; it may need {sorted(LIBRARIES)}")
    print(f"{path.name}: _C links {', '.join(needed)}")


if __name__ == "__main__":
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout
    check_sdist(Path(sys.argv[1]), listed.split())
    check_wheel(Path(sys.argv[2]), listed.split())
