"""Check the links of the built site: ``python docs/check_links.py site``.

Every link to a page, file or anchor of the site must exist. Links to other
servers must have a valid form; with ``--external`` they are fetched as well.
"""

import argparse
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Dict, List, Set, Tuple
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

TIMEOUT = 20  # seconds


class Page(HTMLParser):
    """The links and anchors of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: List[str] = []
        self.anchors: Set[str] = set()
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ('href', 'src') and value is not None:
                self.links.append(value)
            elif name == 'id' or (tag == 'a' and name == 'name'):
                self.anchors.add(value)


def find_fault(
    site: Path, source: Path, link: str, pages: Dict[Path, Page]
) -> str:
    """Return what is wrong with a link, or an empty string."""
    url = urlsplit(link)
    if url.scheme in ('data', 'mailto'):
        return ''
    if url.scheme or url.netloc:
        valid = url.scheme in ('http', 'https') and '.' in url.netloc
        return '' if valid and ' ' not in link else 'is not a valid address'
    target = (source.parent / unquote(url.path)).resolve()
    if not url.path:
        target = source
    elif url.path.startswith('/'):
        return 'is absolute, but the site can be in any folder'
    if target.is_dir():
        target /= 'index.html'
    if site not in target.parents or not target.is_file():
        return 'does not exist'
    if url.fragment and target in pages:
        if unquote(url.fragment) not in pages[target].anchors:
            return 'has an anchor that does not exist'
    return ''


def find_dead_links(site: Path) -> Tuple[List[str], Dict[str, int], Set[str]]:
    """Check all pages of a site.

    Args:
        site (Path): Folder of the site.

    Returns:
        tuple[list[str], dict[str, int], set[str]]: Messages for links that
        are dead, numbers of pages and links, and links to other servers.
    """
    site = site.resolve()
    # The page for missing pages has absolute links, because it is shown for
    # any address.
    paths = [p for p in sorted(site.rglob('*.html')) if p.name != '404.html']
    pages = {path: Page(path) for path in paths}
    counts = dict(pages=len(pages), links=0, external=0)
    dead, external = [], set()
    for path, page in pages.items():
        for link in page.links:
            if urlsplit(link).scheme in ('http', 'https'):
                external.add(link)
                counts['external'] += 1
            counts['links'] += 1
            fault = find_fault(site, path, link, pages)
            if fault:
                dead.append(f'{path.relative_to(site)}: {link} {fault}')
    return dead, counts, external


def fetch(address: str) -> str:
    """Return why an address cannot be fetched, or an empty string."""
    request = Request(address, headers={'User-Agent': 'mmvvt link check'})
    try:
        with urlopen(request, timeout=TIMEOUT):
            return ''
    except OSError as error:
        return str(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('site', type=Path, help='folder of the built site')
    parser.add_argument(
        '--external',
        action='store_true',
        help='also fetch the links to other servers',
    )
    args = parser.parse_args()
    dead, counts, external = find_dead_links(args.site)
    if not counts['pages']:
        sys.exit(f'error: no pages in {args.site}')
    if args.external:
        faults = {address: fetch(address) for address in sorted(external)}
        dead += [f'{a}: {fault}' for a, fault in faults.items() if fault]
    for line in dead:
        print(line)
    print(
        f'{counts["pages"]} pages, {counts["links"]} links of which '
        f'{counts["external"]} to other servers'
        f'{"" if args.external else " (not fetched)"}, {len(dead)} dead'
    )
    sys.exit(1 if dead else 0)


if __name__ == '__main__':
    main()
