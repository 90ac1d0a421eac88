"""What MkDocs adds to the pages: those of the benchmarks, and links that leave `docs/`."""

import os.path
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from benchmarks import records, report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# Pages that stand elsewhere in the repository.
ELSEWHERE = {"benchmarks/README.md": "benchmarks/how.md"}


def results() -> dict[str, str]:
    """The Markdown of every committed result by its name: written from JSON where there is one."""
    pages = {path.stem: path.read_text() for path in sorted(RESULTS.glob("*.md"))}
    for path in sorted(RESULTS.glob("*.json")):
        pages[path.stem] = report.markdown(records.read([path]))
    for name, page in pages.items():
        pages[name] = page.replace("# Benchmarks of trt_kernels\n", f"# Benchmarks, {name}\n", 1)
    names = sorted(pages, key=len, reverse=True)
    for path in sorted(RESULTS.glob("*.png")):
        for name in names:  # a plot NAME-WHAT.png belongs to the longest name
            if path.stem == name or path.stem.startswith(f"{name}-"):
                pages[name] += f"\n![{path.stem}]({path.name})\n"
                break
    return pages


def title(page: str) -> str:
    return page.splitlines()[0].removeprefix("# ")


def index(pages: dict[str, str]) -> str:
    """A table of the results: what was measured, on which machine, when."""
    lines = ["| | measured on | date |", "|---|---|---|"]
    for name, page in pages.items():
        measured = re.search(r"^(.+); (\d{4}-\d\d-\d\d.*)\.$", page, re.MULTILINE)
        machine, date = measured.groups() if measured else ("counted, not timed", "")
        lines.append(f"| [{title(page)}]({name}.md) | {machine} | {date} |")
    if not any(report.GPU_LEGEND in page for page in pages.values()):
        lines += ["", "**No figure of a GPU exists yet**: nothing here has been timed on one."]
    return "\n".join(lines)


def on_config(config: Any) -> Any:
    for section in config.nav:
        if "Benchmarks" in section:
            section["Benchmarks"] += [
                {title(page): f"benchmarks/{name}.md"} for name, page in results().items()
            ]
    return config


def on_files(files: Files, config: Any) -> Files:
    for name, page in results().items():
        files.append(File.generated(config, f"benchmarks/{name}.md", content=page))
    for path in RESULTS.glob("*.png"):
        files.append(File.generated(config, f"benchmarks/{path.name}", abs_src_path=str(path)))
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    folder = Path("docs", page.file.src_uri).parent

    def inside(link: re.Match[str]) -> str:
        """A link to a file outside of docs/: its page, its picture, or its name alone."""
        mark, text, target = link.groups()
        source = Path(os.path.normpath(folder / target)).as_posix()
        if not (ROOT / source).exists():
            raise ValueError(f"{page.file.src_uri}: {target} is not there")
        up = "../" * page.file.src_uri.count("/")
        if source in ELSEWHERE:
            return f"[{text}]({up}{ELSEWHERE[source]})"
        if not mark:
            return text
        if files.get_file_from_path(source) is None:
            files.append(File.generated(config, source, abs_src_path=str(ROOT / source)))
        return f"![{text}]({up}{source})"

    markdown = re.sub(r"(!?)\[([^\]]*)\]\(((?:\.\./)+[^)#]+)\)", inside, markdown)
    if "<!-- results -->" in markdown:
        markdown = markdown.replace("<!-- results -->", index(results()))
    return markdown
