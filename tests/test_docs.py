"""Every Python block of the documentation runs, in order, in one namespace a page."""

import inspect
import re
from pathlib import Path

import pytest

import trt_kernels as tk
from benchmarks.records import Record, Run
from trt_kernels import acceleration
from trt_kernels.compat import trt

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
PEERS = {"spikingjelly", "snntorch", "norse"}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_code_blocks_run(page):
    namespace = {}
    absent = set()
    text = (ROOT / page).read_text()
    # What a block takes for granted stands before it in a comment, what it claims behind it.
    blocks = r"(?:```python|<!-- (?:setup|check))\n(.*?)(?:```|-->)"
    for block in re.findall(blocks, text, re.DOTALL):
        try:
            exec(compile(block, str(page), "exec"), namespace)
        except ModuleNotFoundError as error:
            absent.add(error.name.split(".")[0])
            if not absent <= PEERS:
                raise
        except NameError:
            if not absent:  # else of a block that needs what is absent
                raise
    if absent:
        pytest.skip(f"without {', '.join(sorted(absent))}")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)|src=\"([^\"]+)\"", text):
        target = target[0] or target[1]
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target


def test_readme_commands_are_make_targets():
    makefile = (ROOT / "Makefile").read_text()
    commands = re.search(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    for target in re.findall(r"^make (\w+)", commands, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_every_public_name_is_in_the_reference():
    def own(module, kind):
        names = (name for name, value in vars(module).items() if kind(value))
        return [n for n in names if n[0] != "_" and vars(module)[n].__module__ == module.__name__]

    public = {
        "trt_kernels": set(tk.__all__) - {"nn", "presets"},
        "trt_kernels.nn": own(tk.nn, inspect.isclass),
        "trt_kernels.presets": own(tk.presets, inspect.isfunction),
        "trt_kernels.compat.trt": trt.__all__,
    }
    assert set(acceleration.__all__) <= public["trt_kernels"]
    names = {f"{module}.{name}" for module, known in public.items() for name in known}
    entries = re.findall(r"^::: (\S+)", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    # There `trt_kernels.report` would be the module that the function stands in.
    names = (names - {"trt_kernels.report"}) | {"trt_kernels.report.report"}
    assert sorted(entries) == sorted(names)


def test_every_promise_has_its_test():
    lines = (ROOT / "docs/promises.md").read_text().splitlines()
    promises = [line for line in lines if line.startswith("| ") and line != "| promise | test |"]
    assert len(promises) > 30
    for line in promises:
        tests = re.findall(r"`(\S+\.py)::(\w+)`", line)
        assert tests or "`make test-sanitized`" in line or "`python -m tests.soak`" in line, line
        for file, name in tests:
            assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.M), name


def test_results_become_pages(tmp_path, monkeypatch):
    pytest.importorskip("mkdocs")
    from docs import hooks

    variants = {"ours": {"median": 1e-3}, "relu": {"median": 2e-3}}
    info = {"table": "lif", "case": "(4, 1M)", "ours": "ours", "variants": variants}
    info |= {"element": "neuron-step", "elements": 4, "moved": 1000, "skipped": {}, "steps": 4}
    info |= {"copy": {"median": 1e-3, "moved": 2000}}
    Run([Record(info)], "A Processor", "2026-11-23").save(tmp_path / "cpu-old.json")
    (tmp_path / "cpu.md").write_text("# Older\n\nAnother; 2026-11-22.\n")
    for plot in ("cpu-lif", "cpu-old-lif"):
        (tmp_path / f"{plot}.png").touch()
    monkeypatch.setattr(hooks, "RESULTS", tmp_path)
    pages = hooks.results()
    assert "A Processor; 2026-11-23." in pages["cpu-old"]
    assert "| (4, 1M) | 1 ms | 0.001 | 50% | 2.00× |" in pages["cpu-old"]
    assert pages["cpu"].endswith("\n![cpu-lif](cpu-lif.png)\n")
    index = hooks.index(pages)
    assert "| [Older](cpu.md) | Another | 2026-11-22 |" in index
    assert "| [Benchmarks, cpu-old](cpu-old.md) | A Processor | 2026-11-23 |" in index
    assert "No figure of a GPU exists yet" in index
    gpu = [Record({**info, "device": "cuda"})]
    Run(gpu, "A GPU", "2026-11-24").save(tmp_path / "gpu.json")
    assert "No figure" not in hooks.index(hooks.results())
