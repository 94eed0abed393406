"""What tests look for in the pages that heddle writes."""

import json
import re
from html.parser import HTMLParser


class Assets(HTMLParser):
    """Everything a browser would load from elsewhere, and how many scripts there are."""

    def __init__(self):
        super().__init__()
        self.loaded, self.scripts = [], 0

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.loaded += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag in ("link", "iframe", "object", "embed", "base"):
            self.loaded.append(tag)


def assets(text):
    parser = Assets()
    parser.feed(text)
    parser.close()
    return parser


def figures_in(text):
    """Data, layout and configuration of each chart of a page, as the browser reads them."""
    return [json.loads(found) for found in re.findall(r'Plotly\.newPlot\("plot-[0-9a-f]+",\.\.\.(.*)\)</script>', text)]
