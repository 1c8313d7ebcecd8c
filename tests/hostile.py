"""Text that would be interpreted instead of displayed, if it reached a terminal, Markdown or HTML unescaped."""

HOSTILE = {
    "color": "\x1b[31mred\x1b[0m",
    "clipboard": "\x1b]52;c;cm0gLXJmIH4=\x07",
    "link": "\x1b]8;;https://evil.example\x1b\\text\x1b]8;;\x1b\\",
    "8-bit sequence": "\x9b2J\x9d0;title\x9c",
    "overwriting": "failed\rpassed",
    "backspaces": "rm -rf ~\b\b\b\b\b\b\bls\x7f",
    "bidirectional override": "access\u202e\u2066level\u2069",
    "line separators": "one\u2028two\u2029three\x85four",
    "surrogate": "name\udc80",
    "image in a code span": "a`b` ![x](https://evil.example/a.png) `c",
    "image": "![x](https://evil.example/a.png)",
    "reference": "[x]: https://evil.example/a.png",
    "autolink": "<https://evil.example> https://evil.example www.evil.example",
    "script": "</td></code><script>alert(1)</script>",
    "image tag": "<img src=https://evil.example/a.png onerror=alert(1)>",
    "table": "a | b || c",
    "new line": "first\nsecond | third\n# fourth",
    "code fence": "```\n![x](https://evil.example/a.png)\n~~~~\n````",
    "emphasis": "*a* __init__ ~b~ **c** _d_",
    "escapes": "\\`\\*&lt;&#60;&amp;",
    "blocks": "# - 1. > +",
}
"""Hostile strings by what they contain."""
