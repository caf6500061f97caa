"""Write the guide's page on every public name, from the docstrings: python examples/write_reference.py"""

import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import atc_diffusion

PAGE = Path(__file__).parent / "guide" / "reference.md"
HEAD = """# Reference

Everything that `from atc_diffusion import ...` offers, written from the docstrings by
`python examples/write_reference.py`.
"""
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):\n((?:    .*\n|\n)+)", re.MULTILINE)
ENTRY = re.compile(r"^    ([\w*]+)(?: \(default: (.+)\))?:\s+(.*(?:\n {8}.*)*)", re.MULTILINE)
BETWEEN_PARAMETERS = re.compile(r", (?![^([{]*[)\]}])")  # not within the brackets of a default


def page() -> str:
    public = {name: getattr(atc_diffusion, name) for name in atc_diffusion.__all__}
    functions = {name: each for name, each in public.items() if not inspect.isclass(each)}
    classes = {name: each for name, each in public.items() if inspect.isclass(each)}
    blocks = [HEAD, "## Functions", *entries(functions), "## Classes"]
    for name, kind in classes.items():
        blocks += [*entries({name: kind}), *methods(name, kind)]
    return "\n\n".join(block.strip() for block in blocks) + "\n"


def entries(public: dict[str, object]) -> Iterator[str]:
    for name, each in public.items():
        yield f"### {name}"
        if not inspect.isclass(each) or "__init__" in vars(each):
            yield f"```\n{call(name, each)}\n```"
        yield from paragraphs(inspect.getdoc(each) or "")


def methods(kind_name: str, kind: type) -> Iterator[str]:
    """The public methods and properties that have a docstring of their own."""
    for name, member in vars(kind).items():
        each = member.__func__ if isinstance(member, classmethod) else member
        if name.startswith("_") or not each.__doc__ or not (inspect.isfunction(each) or isinstance(each, property)):
            continue
        yield f"#### {kind_name}.{name}"
        if not isinstance(each, property):
            yield f"```\n{call(f'{kind_name}.{name}', getattr(kind, name))}\n```"
        yield from paragraphs(inspect.cleandoc(each.__doc__))


def call(name: str, function: object) -> str:
    """How a function is called: its parameters with their defaults, without types."""
    assert callable(function)
    signature = inspect.signature(function)
    bare = [
        each.replace(annotation=each.empty, default=... if inspect.isfunction(each.default) else each.default)
        for each in signature.parameters.values()
        if each.name != "self"
    ]
    shown = str(signature.replace(parameters=bare, return_annotation=signature.empty)).replace("Ellipsis", "...")
    if len(name + shown) <= 110:
        return name + shown
    return f"{name}(\n" + "".join(f"    {part},\n" for part in BETWEEN_PARAMETERS.split(shown[1:-1])) + ")"


def paragraphs(docstring: str) -> Iterator[str]:
    """A docstring of Google's style as Markdown."""
    rest, end = docstring + "\n", 0
    for section in SECTION.finditer(rest):
        yield from texts(rest[end : section.start()])
        title, body = section.groups()
        yield f"**{title}**"
        yield from [listed(body)] if ENTRY.search(body) and title not in ("Returns", "Yields") else texts(body)
        end = section.end()
    yield from texts(rest[end:])


def texts(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", textwrap.dedent(text).strip("\n")):
        if ">>>" in paragraph:
            yield f"```\n{textwrap.dedent(re.sub('^Example:.*', '', paragraph)).strip()}\n```"
        elif paragraph.strip():
            yield filled(paragraph)


def listed(body: str) -> str:
    """The entries of a section as a list."""
    return "\n".join(
        filled(f"- `{name}`{f' (default: `{default}`)' if default else ''}: {text}", "  ")
        for name, default, text in ENTRY.findall(body)
    )


def filled(text: str, indent: str = "") -> str:
    text = " ".join(text.split())
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
