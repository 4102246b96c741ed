"""Hooks of the documentation site; mkdocs.yml names this file.

The pages of the site keep the paths that they have in the repository, so that
a relative link is the same link on a code host and on the site. The site has

- the pages in docs/,
- the READMEs and other pages of the repository that ``nav`` names, from their
  place,
- sections of README.md as pages of their own, see ``SECTIONS``,
- each file or folder of the repository that a page links to: pictures as they
  are, and everything else as a page that shows its text.

Formulas are converted to MathML, which browsers render without a script.
"""

import ast
import html
import logging
import re
import zlib
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

ROOT = Path(__file__).resolve().parent.parent
DOCS = 'docs'

# Pages made of sections of README.md. The title of the page is the heading of
# the first section.
SECTIONS: Dict[str, List[str]] = {
    'quick_start.md': ['Quick start', 'Install'],
    'published_checkpoints.md': ['Published checkpoints'],
    'python.md': ['In Python'],
    'train.md': ['Train and test'],
    'predict.md': ['Predict'],
    'export.md': ['Export'],
    'measure.md': ['Measure'],
    'citation.md': ['Citation', 'Licence'],
}
PICTURES = ('.png', '.svg', '.jpg')
LANGUAGES = {'.py': 'python', '.sh': 'bash', '.yml': 'yaml', '.yaml': 'yaml'}

FENCE = re.compile(r'^( *)(`{3,}|~{3,}).*?^\1\2`*$', re.DOTALL | re.MULTILINE)
LINK = re.compile(r'\]\(([^)\s]+)\)')
FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL
)


def readme_sections() -> Dict[str, str]:
    """Return the text of each section of README.md by its heading."""
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    # Comments in code blocks look like headings.
    hidden = FENCE.sub(lambda m: re.sub(r'[^\n]', ' ', m[0]), text)
    starts = [
        (m.start(), m[1]) for m in re.finditer(r'^## (.+)$', hidden, re.M)
    ]
    ends = [start for start, _ in starts[1:]] + [len(text)]
    return {name: text[a:b] for (a, name), b in zip(starts, ends)}


def section_pages() -> Dict[str, str]:
    """Return the text of the pages that are made of sections of README.md."""
    sections = readme_sections()
    pages = {}
    for page, names in SECTIONS.items():
        text = ''.join(sections[name] for name in names)
        pages[page] = text[1:]  # '## Title' becomes '# Title'
    return pages


def slug(heading: str) -> str:
    """Return the anchor of a heading, as code hosts and the site make it."""
    text = re.sub(r'[^\w\- ]', '', heading.strip().lower())
    return text.replace(' ', '-')


def point_to_sections(page: str, text: str) -> str:
    """Let links to sections of README.md point to the pages of the site."""
    homes = {
        slug(name): path for path, names in SECTIONS.items() for name in names
    }

    def replace(match):
        path, _, anchor = match[1].partition('#')
        if resolve(page, path) != 'README.md' or anchor not in homes:
            return match[0]
        return f']({path[: -len("README.md")]}{homes[anchor]}#{anchor})'

    return LINK.sub(replace, text)


def indent_lists(text: str) -> str:
    """Indent the contents of list items by four spaces.

    CommonMark, and so code hosts, aligns them with the text of the item.
    Python-Markdown requires four spaces, and otherwise ends the list.
    """
    lines, width, in_code = [], 0, False
    for line in text.split('\n'):
        if line.startswith('```'):
            in_code = not in_code
        item = None if in_code else re.match(r'(?:[-*]|\d+\.) +', line)
        if item:
            width = len(item[0])
        elif width and line.startswith(' ' * width):
            line = ' ' * (4 - width) + line
        elif line.strip():
            width = 0  # A line that is not indented ends the list.
        lines.append(line)
    return '\n'.join(lines)


def nav_pages(nav) -> Iterator[str]:
    """Yield the paths in ``nav`` of mkdocs.yml."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for value in nav.values():
            yield from nav_pages(value)
    else:
        for value in nav:
            yield from nav_pages(value)


def page_texts(nav) -> Dict[str, str]:
    """Return the text of each page by its path in the repository."""
    texts = section_pages()
    paths = {
        p.relative_to(ROOT).as_posix() for p in (ROOT / DOCS).rglob('*.md')
    }
    for path in sorted(paths | set(nav_pages(nav)) - set(texts)):
        if (ROOT / path).is_file():  # mkdocs reports those that are missing
            texts[path] = (ROOT / path).read_text(encoding='utf-8')
    return {
        page: point_to_sections(page, text) for page, text in texts.items()
    }


def find_links(text: str) -> Iterator[Tuple[str, str]]:
    """Yield path and anchor of each relative link outside code blocks."""
    text = re.sub(r'`[^`\n]+`', '', FENCE.sub('', text))
    for link in LINK.findall(text):
        if not re.match(r'[a-z]+:', link):
            path, _, anchor = link.partition('#')
            yield path, anchor


def resolve(page: str, link: str) -> str:
    """Return the path in the repository that a link of a page points to.

    Args:
        page (str): Path of the page in the repository.
        link (str): Path of a relative link, without an anchor. If it is
            empty, the result is the page.

    Returns:
        str: Path relative to the root, or with ``..`` if it is outside.
    """
    if not link:
        return page
    parts: List[str] = []
    for part in [*page.split('/')[:-1], *link.rstrip('/').split('/')]:
        if part == '..' and parts and parts[-1] != '..':
            parts.pop()
        elif part != '.':
            parts.append(part)
    return '/'.join(parts)


def show_file(path: str) -> str:
    """Return a page that shows a file or folder of the repository."""
    source = ROOT / path
    front = f'---\ntitle: {source.name}\nsearch: {{exclude: true}}\n---\n'
    if source.is_dir():
        names = sorted(p.name for p in source.iterdir() if p.is_file())
        lines = [f'- [{name}]({source.name}/{name})' for name in names]
        return f'{front}\n# {path}\n\n' + '\n'.join(lines)
    text = source.read_text(encoding='utf-8')
    if source.suffix == '.md':
        return front + indent_lists(text)
    language = LANGUAGES.get(source.suffix, 'text')
    return f'{front}\n# {path}\n\n````{language}\n{text}````\n'


def on_files(files, config):
    """Give each page its path in the repository, and add linked files."""
    from mkdocs.structure.files import File, Files, InclusionLevel

    class SourceFile(File):
        """A file of the repository that is shown as a page."""

        def is_documentation_page(self):
            return True

    def add(path, uri, inclusion=InclusionLevel.UNDEFINED, **content):
        kind = File
        if not path.endswith(PICTURES) and 'content' in content:
            kind = SourceFile
        file = kind.generated(config, path, inclusion=inclusion, **content)
        file.dest_uri = uri
        moved.append(file)

    moved = Files([])
    for file in files:
        # Pages are added below, and files of the theme are not in docs/.
        if file.generated_by or file.is_documentation_page():
            continue
        if file.src_dir != config.docs_dir:
            moved.append(file)
        elif not file.inclusion.is_excluded():
            add(
                f'{DOCS}/{file.src_uri}',
                f'{DOCS}/{file.src_uri}',
                abs_src_path=file.abs_src_path,
            )
    texts = page_texts(config.nav)
    for path, text in texts.items():
        uri = path.removeprefix(f'{DOCS}/').removesuffix('.md')
        add(
            path,
            uri.replace('README', 'index') + '.html',
            content=indent_lists(text),
        )

    shown = set(texts) | {file.src_uri for file in moved}
    pending = list(texts.items())
    while pending:
        page, text = pending.pop()
        for link, _ in find_links(text):
            path = resolve(page, link)
            if path in shown or not (ROOT / path).exists():
                continue  # mkdocs reports links to missing files
            shown.add(path)
            if path.endswith(PICTURES):
                add(path, path, abs_src_path=str(ROOT / path))
                continue
            content = show_file(path)
            add(
                path,
                f'source/{path}.html',
                InclusionLevel.NOT_IN_NAV,
                content=content,
            )
            pending.append((path, content))
    return moved


def public_names() -> Iterator[str]:
    """Yield the names that the packages of mmvvt list in ``__all__``."""
    for path in sorted((ROOT / 'mmvvt').glob('*/__init__.py')):
        for node in ast.parse(path.read_text(encoding='utf-8')).body:
            if isinstance(node, ast.Assign) and (
                getattr(node.targets[0], 'id', '') == '__all__'
            ):
                for name in ast.literal_eval(node.value):
                    yield f'mmvvt.{path.parent.name}.{name}'


def on_post_build(config):
    """Warn about public names that are not in the API reference."""
    data = (Path(config.site_dir) / 'objects.inv').read_bytes()
    # Four lines of text, and a compressed line for each name
    names = zlib.decompress(data.split(b'\n', 4)[4]).decode()
    found = {line.split(' ')[0] for line in names.splitlines()}
    for name in public_names():
        # A function may have the name of its module: dry_run.dry_run.
        same = f'{name}.{name.rpartition(".")[2]}'
        if not {name, same} & found:
            logging.getLogger('mkdocs.hooks').warning(
                f'{name} is not in the API reference: it needs a docstring, '
                'and its package a page in docs/api/'
            )


def on_page_content(content, page, config, files):
    """Convert formulas to MathML."""
    from latex2mathml.converter import convert

    def mathml(match):
        display = 'block' if match[1] == 'div' else 'inline'
        return convert(html.unescape(match[2]), display=display)

    return FORMULA.sub(mathml, content)
