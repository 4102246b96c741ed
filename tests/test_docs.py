"""The sources of the documentation site; `make docs` checks the built site."""

import ast
import math
import re
import textwrap

import pytest
import yaml

from conftest import ROOT, load_tool, run_tool

hooks = load_tool('docs/hooks.py')


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without the classes that it refers to."""


Loader.add_multi_constructor('tag:yaml.org,2002:python/', lambda *_: None)
CONFIG = yaml.load((ROOT / 'mkdocs.yml').read_text(), Loader)
NAV = list(hooks.nav_pages(CONFIG['nav']))
PAGES = hooks.page_texts(CONFIG['nav'])
PUBLIC = sorted(
    path.parent.relative_to(ROOT).as_posix().replace('/', '.')
    for path in (ROOT / 'mmvvt').glob('*/__init__.py')
    if '__all__' in path.read_text(encoding='utf-8')
)


def without_code(text):
    return hooks.FENCE.sub('', text)


def anchors_of(path):
    """Anchors of the headings of a Markdown file."""
    text = PAGES.get(path) or (ROOT / path).read_text(encoding='utf-8')
    headings = re.findall(r'^#+ (.+)$', without_code(text), re.MULTILINE)
    return {hooks.slug(heading) for heading in headings}


def test_every_page_is_in_the_navigation():
    assert len(NAV) == len(set(NAV))
    assert set(PAGES) == set(NAV)
    # The READMEs of the recipes and of the benchmarks are pages too.
    readmes = ROOT.glob('configs/*/README.md')
    assert {p.relative_to(ROOT).as_posix() for p in readmes} <= set(NAV)


@pytest.mark.parametrize('page', sorted(PAGES))
def test_links_and_anchors_exist(page):
    for path, anchor in hooks.find_links(PAGES[page]):
        target = hooks.resolve(page, path)
        assert not target.startswith('..'), path
        assert target in PAGES or (ROOT / target).exists(), path
        if anchor and target.endswith('.md'):
            assert anchor in anchors_of(target), f'{path}#{anchor}'


def test_sections_of_the_readme_have_pages():
    """Sections that are missing here are not on the site."""
    shown = {name for names in hooks.SECTIONS.values() for name in names}
    # CONTRIBUTING.md is a page of its own.
    assert set(hooks.readme_sections()) - shown == {'Develop'}
    assert shown <= set(hooks.readme_sections())


def test_links_to_sections_lead_to_their_pages():
    link = 'see [Install](../README.md#install) and [it](../README.md#develop)'
    assert hooks.point_to_sections('docs/deploy.md', link) == (
        'see [Install](../quick_start.md#install) and '
        '[it](../README.md#develop)'
    )


def test_lists_are_indented_for_the_site():
    text = '1. a\n   b\n\n   ```\n   - c\n   ```\n2. d\n- e\n  - f\n\ng\n  h'
    assert hooks.indent_lists(text).splitlines() == [
        '1. a',
        '    b',
        '',
        '    ```',
        '    - c',
        '    ```',
        '2. d',
        '- e',
        '    - f',
        '',
        'g',
        '  h',
    ]
    code = '```\n- a\n  b\n```\n  c\n'
    assert hooks.indent_lists(code) == code


@pytest.mark.parametrize('page', sorted(PAGES))
def test_no_wrapped_line_looks_like_a_list(page):
    """A line of a list item that begins with '16. ' is a list on the site."""
    found = re.findall(
        r'^( +)(?![-*\d]).+\n(\1\d+\. .*)', without_code(PAGES[page]), re.M
    )
    assert found == []


@pytest.mark.parametrize('package', PUBLIC)
def test_public_packages_are_in_the_reference(package):
    """Public names are rendered if they are in __all__ and documented."""
    pages = [p for p, text in PAGES.items() if f'::: {package}\n' in text]
    assert len(pages) == 1 and pages[0].startswith('docs/api/')


def is_name(node, name):
    return isinstance(node, ast.Name) and node.id == name


def docstring_of(package, name):
    """Find the docstring of a public name without importing it."""
    path = ROOT / package.replace('.', '/') / '__init__.py'
    for node in ast.parse(path.read_text(encoding='utf-8')).body:
        if not isinstance(node, ast.ImportFrom):
            continue
        if name in [alias.name for alias in node.names]:
            folder = path.parent if node.level == 1 else path.parent.parent
            path = folder / f'{node.module.replace(".", "/")}.py'
    body = ast.parse(path.read_text(encoding='utf-8')).body
    for node, after in zip(body, [*body[1:], None]):
        if getattr(node, 'name', '') == name:
            return ast.get_docstring(node)
        if isinstance(node, ast.Assign) and is_name(node.targets[0], name):
            is_text = isinstance(after, ast.Expr) and isinstance(
                after.value, ast.Constant
            )
            return after.value.value if is_text else None
    raise AssertionError(f'{package}.{name} was not found')


@pytest.mark.parametrize('package', PUBLIC)
def test_public_names_are_documented(package):
    names = [
        name.rpartition('.')[2]
        for name in hooks.public_names()
        if name.startswith(f'{package}.')
    ]
    assert names
    assert [name for name in names if not docstring_of(package, name)] == []


# -- troubleshooting ----------------------------------------------------------

# Messages of other packages, and headings that are no messages
OTHERS = (
    "No module named '",
    'libc10.so: ',
    'MMCV==',
    'VVT is not in the ',
    'Weights only load failed',
    'CUDA out of memory',
    'environment variable RANK',
    'The server socket',
    'insufficient shared memory',
)
# Values of variables in messages
VARIABLES = {'32 x 32': '... x ...', 'folder does not exist': 'folder ...'}


def messages_of_the_package():
    """All strings of the source, with ``...`` for the parts that vary."""
    files = [*(ROOT / 'mmvvt').rglob('*.py'), *(ROOT / 'tools').rglob('*.py')]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.JoinedStr):
                yield ''.join(
                    part.value if isinstance(part, ast.Constant) else '...'
                    for part in node.values
                )
            elif isinstance(node, ast.Constant) and type(node.value) is str:
                yield node.value


def test_messages_in_troubleshooting_are_those_of_the_source():
    text = PAGES['docs/troubleshooting.md']
    documented = re.findall(r'^### `(.+)`$', text, re.MULTILINE)
    own = [m for m in documented if not m.startswith(OTHERS)]
    assert len(own) > 25
    source = list(messages_of_the_package())
    missing = []
    for message in own:
        # Each part in the order of the message, in one string of the source.
        for value, variable in VARIABLES.items():
            message = message.replace(value, variable)
        parts = [re.escape(part) for part in message.split('...')]
        pattern = re.compile('.*'.join(parts), re.DOTALL)
        if not any(map(pattern.search, source)):
            missing.append(message)
    assert missing == []


# -- commands and scripts of the pages ----------------------------------------


def test_figures(tmp_path):
    """The figures show the vicinity weight and all backbones of the CSV."""
    figures = load_tool('docs/figures.py')
    figures.main(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    images = (ROOT / 'docs' / 'images').glob('*.svg')
    assert drawn == {path.name for path in images}
    weights = figures.weight_map((25, 3), 'sum')
    assert weights[25, 3] == weights.max() == 2
    expected = math.cos(math.pi / 2 * 25 / 28) + math.cos(
        math.pi / 2 * (27 - 3) / 28
    )
    assert weights[0, 27].item() == pytest.approx(expected, abs=1e-6)
    rows = figures.read_csv(ROOT / 'benchmarks' / figures.RESULTS[0])
    assert {row.model for row in rows} == set(figures.NAMES)


def test_script_for_fsdp(tmp_path):
    """Two processes on the CPU train with the script of docs/clusters.md."""
    (script,) = re.findall(
        r'```python\n(.*?)```', PAGES['docs/clusters.md'], re.DOTALL
    )
    (tmp_path / 'train_fsdp.py').write_text(script)
    (tmp_path / 'config.py').write_text(
        textwrap.dedent(f"""
            _base_ = ['{ROOT}/configs/demo/vvt-nano_digits.py']
            train_cfg = dict(max_epochs=1)
            train_dataloader = dict(dataset=dict(indices=128))
            val_dataloader = dict(dataset=dict(indices=20))
        """)
    )
    done = run_tool(
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node=2',
        'train_fsdp.py',
        'config.py',
        'run',
        cwd=tmp_path,
        env=dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'),
    )
    assert done.returncode == 0, done.stdout[-3000:]
    import torch

    from mmvvt.checkpoint import load_checkpoint_file

    state = load_checkpoint_file(str(tmp_path / 'run' / 'epoch_1.pth'))
    assert state['state_dict']['head.fc.weight'].shape == (10, 128)
    assert torch.isfinite(state['state_dict']['head.fc.weight']).all()


def write_site(folder, link):
    (folder / 'a').mkdir()
    (folder / 'index.html').write_text(
        f'<h1 id="top">T</h1><a href="{link}">x</a>'
    )
    (folder / 'a' / 'index.html').write_text('<h1 id="one">1</h1>')


@pytest.mark.parametrize(
    'link, fault',
    [
        ('a/index.html#one', None),
        ('a/#one', None),
        ('#top', None),
        ('https://example.org/x#y', None),
        ('b.html', 'does not exist'),
        ('../x.html', 'does not exist'),
        ('a/index.html#two', 'an anchor that does not exist'),
        ('#bottom', 'an anchor that does not exist'),
        ('/a/index.html', 'absolute'),
        ('https://nowhere', 'not a valid address'),
        ('htps://example.org', 'not a valid address'),
    ],
)
def test_link_check(tmp_path, link, fault):
    write_site(tmp_path, link)
    done = run_tool('docs/check_links.py', tmp_path)
    assert done.returncode == (1 if fault else 0), done.stdout
    assert (fault or '2 pages, 1 links') in done.stdout
