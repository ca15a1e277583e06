"""The text that the demo model learns: documentation of Python found on any machine, and this project's own.

```
modules of the standard library: docstrings + longer comments ─┐
topics of Python's help system ────────────────────────────────┼─> documents ─┬─> held out, by the hash of their names
README, docs/ of this project ─────────────────────────────────┘              └─> training
docstrings of every public name ──> Facts: (name, explanation), none of them held out ──> conversations
```
"""

import ast
import hashlib
import importlib
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT_CHARS = 80_000
HELD_OUT_SIZES = range(2_000, 14_000)
"""Characters of a document that may be held out: whole documents, none of them most of the text."""
MAX_ANSWER_CHARS = 420
# Their text is not prose, or not the Python authors' own.
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "ensurepip"}
FACT_MODULES = (  # noqa: SIM905 - a list would take a line for each
    "abc argparse array ast asyncio atexit base64 bisect builtins bz2 calendar cmath cmd codecs collections "
    "collections.abc concurrent.futures configparser contextlib copy csv ctypes dataclasses datetime decimal difflib "
    "dis email email.message enum fileinput filecmp fnmatch fractions functools gc getpass glob graphlib gzip hashlib "
    "heapq hmac html html.parser http.client http.server importlib inspect io ipaddress itertools json keyword "
    "linecache locale logging logging.handlers lzma mailbox math mimetypes multiprocessing numbers operator os os.path "
    "pathlib pickle pkgutil platform plistlib pprint profile queue random re sched secrets select selectors shelve "
    "shlex shutil signal socket socketserver sqlite3 ssl stat statistics string struct subprocess symtable sys tarfile "
    "tempfile textwrap threading time timeit token tokenize trace traceback tracemalloc types typing unicodedata "
    "unittest unittest.mock urllib.parse urllib.request uuid warnings wave weakref xml.dom.minidom "
    "xml.etree.ElementTree zipfile zlib zoneinfo"
).split()


@dataclass(frozen=True, slots=True)
class Fact:
    """Something a user may ask about, and what there is to say."""

    name: str
    """As one writes it: `str.split`, or the title of a help topic."""
    signature: str
    """With its parentheses; empty where there is none."""
    text: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """All text, split."""

    training: list[str]
    held_out: list[str]
    facts: list[Fact]


def load_corpus() -> Corpus:
    """Read everything; the same machine gives the same corpus."""
    python = _module_documents() | {f"topic {name}": topics.topics[name].strip() for name in sorted(topics.topics)}
    by_hash = sorted(python, key=lambda name: hashlib.sha256(name.encode()).digest())
    held_out: list[str] = []
    for name in by_hash:
        if len(python[name]) in HELD_OUT_SIZES and sum(map(len, held_out)) < HELD_OUT_CHARS:
            held_out.append(python.pop(name))
    held_text = "\n".join(held_out)
    own = [path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    training = [_without(document, held_text) for document in python.values()] + own
    return Corpus(
        training=[document for document in training if len(document) > 40],
        held_out=held_out,
        facts=[fact for fact in (*_python_facts(), *_topic_facts()) if fact.text[:80] not in held_text],
    )


def _module_documents() -> dict[str, str]:
    """Module name -> its docstrings and longer comments, each text once, in the order of the source."""
    root = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    documents = {}
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS & set(path.relative_to(root).parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            pieces = sorted([*_docstrings(ast.parse(source)), *_comments(source)])
        except (SyntaxError, UnicodeDecodeError):
            continue
        new = [text for _, text in pieces if text not in seen]
        seen.update(new)
        if new:
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            documents[name] = "\n\n".join([f"Module {name}", *new])
    return documents


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) > 40:
                name = "" if isinstance(node, ast.Module) else f"{node.name}: "
                yield getattr(node, "lineno", 0), name + text


def _comments(source: str) -> Iterator[tuple[int, str]]:
    for match in re.finditer(r"(?:^[ \t]*# .*\n){3,}", source, re.MULTILINE):
        text = re.sub(r"^[ \t]*# ?", "", match.group(), flags=re.MULTILINE).strip()
        letters = sum(char.isalpha() or char.isspace() for char in text)
        if letters > 0.85 * len(text) and "icense" not in text and "opyright" not in text:
            yield source.count("\n", 0, match.start()) + 1, text


def _without(document: str, held_text: str) -> str:
    """The document less the paragraphs that were held out elsewhere."""
    return "\n\n".join(p for p in document.split("\n\n") if len(p) < 80 or p not in held_text)


def _python_facts() -> list[Fact]:
    facts: dict[str, Fact] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module_name in FACT_MODULES:
            module = importlib.import_module(module_name)
            _add_fact(facts, module_name, module)
            prefix = "" if module_name == "builtins" else f"{module_name}."
            for name, value in sorted(vars(module).items()):
                if name.startswith("_") or inspect.ismodule(value) or not callable(value):
                    continue
                _add_fact(facts, prefix + name, value)
                if inspect.isclass(value) and not issubclass(value, BaseException):
                    for method, function in sorted(vars(value).items()):
                        if not method.startswith("_") and (
                            inspect.isroutine(function) or inspect.isdatadescriptor(function)
                        ):
                            _add_fact(facts, f"{prefix}{name}.{method}", function)
    once = {(fact.name.rpartition(".")[2], fact.text): fact for fact in reversed(facts.values())}
    return sorted(once.values(), key=lambda fact: fact.name)


def _add_fact(facts: dict[str, Fact], name: str, value: object) -> None:
    own = getattr(value, "__doc__", None)
    text = shorten(_without_usage(inspect.cleandoc(own), name)) if isinstance(own, str) else ""
    if len(text) < 25 or own == type(value).__doc__:
        return
    try:
        signature = str(inspect.signature(value)) if callable(value) else ""
    except (ValueError, TypeError):
        signature = ""
    if len(signature) > 70 or " at 0x" in signature or "<" in signature:
        signature = ""
    facts.setdefault(name, Fact(name, re.sub(r"^\((self, )?(self|/)?(, )?", "(", signature), text))


def _without_usage(text: str, name: str) -> str:
    """The text less the lines that only show how to call it, as older docstrings begin."""
    last = name.rpartition(".")[2]
    return re.sub(rf"^(?:(?:\w+\.)?{re.escape(last)}\(.*\)(?: -+> ?.*)?\n+)+", "", text).strip() or text


def _topic_facts() -> Iterator[Fact]:
    for name in sorted(topics.topics):
        title, _, body = topics.topics[name].strip().partition("\n")
        text = shorten(body.lstrip("*=-\n "))
        if len(text) > 60:
            yield Fact(title.replace('"', "`"), "", text)


def shorten(text: str) -> str:
    """The first paragraphs of a documentation text, unwrapped, cut at a sentence, at most `MAX_ANSWER_CHARS` long."""
    paragraphs: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        is_prose = not re.search(r"^(?:    |>>>|\s+[-*] |   \w+.*::=|[-=*]{4})", paragraph, re.MULTILINE)
        if not is_prose or sum(map(len, paragraphs)) + len(paragraph) > MAX_ANSWER_CHARS:
            break
        paragraphs.append(" ".join(paragraph.split()))
    if len(paragraphs) > 1 and paragraphs[-1].endswith(":"):  # announces an example
        paragraphs.pop()
    if paragraphs:
        return "\n\n".join(paragraphs).rstrip(":")
    sentences = re.split(r"(?<=[.!?]) +", " ".join(text.split("\n\n")[0].split()))
    return sentences[0] if len(sentences[0]) <= MAX_ANSWER_CHARS else ""
