"""Fill the card templates of `model_cards/`.

A card is Markdown, and some of its values come from users: titles, and names of folders and scans. The templates pass
them through `text` or `code`, so that no value becomes a link, a table or HTML.
"""

import re
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2


def escape_text(text: str) -> str:
    """Return Markdown that shows a text as it is, in one line.

    Example:
        >>> print(escape_text("<b>my_data</b> & more"))
        \\<b\\>my\\_data\\</b\\> \\& more
    """
    return re.sub(r"[\\`*_\[\]<>|~&$#]", r"\\\g<0>", " ".join(text.split()))


def clean_code(text: str) -> str:
    """Return a name for a code span of Markdown, where nothing can be escaped. What could end the span becomes `?`.

    Example:
        >>> clean_code("my`model")
        'my?model'
    """
    return "".join(letter if letter.isprintable() and letter not in "`|" else "?" for letter in text)


def render_card(template_name: str, **facts: Any) -> str:
    """Fill a card template.

    Args:
        template_name: Name of a file in `model_cards/`.
        **facts: A value for each variable of the template.

    Returns:
        The card: Markdown with YAML front matter.

    Raises:
        jinja2.UndefinedError: If the template has a variable without a value.
    """
    return load_template(template_name).render(facts)


@cache
def load_template(name: str) -> jinja2.Template:
    """Return a card template; `name` is that of a file in `model_cards/`."""
    # `model_cards` is a package, so the templates are also found in an installed copy of this project.
    template = files("model_cards").joinpath(name).read_text(encoding="utf-8")
    # `StrictUndefined` makes a missing fact an error. `ModelCard.from_template` of huggingface_hub leaves a blank.
    # `trim_blocks` and `lstrip_blocks` remove the lines of `{% if %}` and `{% for %}`, which would cut a table in two.
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"text": escape_text, "code": clean_code}
    return environment.from_string(template)
