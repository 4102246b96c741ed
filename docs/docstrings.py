"""Converts the reStructuredText in docstrings to Markdown for the site."""

import re

import griffe

ROLE = re.compile(r':(class|func|meth|mod|attr|obj|data|exc):`~?([^`]+)`')
MATH = re.compile(r':math:`([^`]+)`')
LINK = re.compile(r'`([^`<]+?)\s*<(https?://[^>]+)>`_')


class Docstrings(griffe.Extension):
    """Converts roles, formulas and external links."""

    def on_instance(self, *, obj, **kwargs):
        """Convert the docstring of a module, class, function or attribute."""
        if not obj.docstring:
            return

        def reference(match):
            # Names that are not in the API reference stay plain text.
            try:
                path = obj.resolve(match[2])
            except griffe.NameResolutionError:
                path = match[2]
            return (
                f'<autoref identifier="{path}" optional>'
                f'<code>{match[2]}</code></autoref>'
            )

        text = ROLE.sub(reference, obj.docstring.value)
        text = MATH.sub(r'$\1$', text)
        obj.docstring.value = LINK.sub(r'[\1](\2)', text)
