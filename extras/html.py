"""Pieces of a page that stands alone: text and pictures -> HTML in one file, nothing fetched.

    title, sections -> page -> OUT/report.html, or what compare.py writes

Everything that comes from data goes through `text`: a caption may hold HTML.
"""

import base64
import html
from pathlib import Path

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif;
       color: #222; background: #fafafa; margin: 0 auto; padding: 24px; max-width: 1180px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 34px 0 10px; }
p { margin: 6px 0; } .quiet { color: #666; } code { font-size: 13px; overflow-wrap: anywhere; }
table { border-collapse: collapse; background: #fff; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 4px 12px; border: 1px solid #e2e2e2;
         overflow-wrap: anywhere; } th { font-weight: 600; background: #f3f3f3; }
.figures, .charts, .cards { display: flex; flex-wrap: wrap; gap: 12px; align-items: flex-start; }
.figure { background: #fff; border: 1px solid #e2e2e2; border-radius: 8px; padding: 8px 14px; }
.figure b { display: block; font-size: 20px; }
.charts svg { background: #fff; border: 1px solid #e2e2e2; border-radius: 8px; width: 100%; }
.charts > * { flex: 1 1 460px; max-width: 580px; }
svg text { font-size: 11px; fill: #555; } svg .title { font-size: 13px; font-weight: 600;
           fill: #222; } svg .legend { fill: #222; paint-order: stroke; stroke: #fff;
           stroke-width: 3px; } svg .grid { stroke: #e8e8e8; fill: none; }
.card { background: #fff; border: 1px solid #e2e2e2; border-radius: 8px; padding: 10px;
        width: 270px; box-sizing: border-box; } .card img { width: 100%; border-radius: 4px; }
.card table { width: 100%; font-size: 13px; } .card td, .card th { padding: 2px 6px; }
.card td:first-child, .card th { white-space: nowrap; }
.right { color: #14782a; } .wrong { color: #b01e1e; } .told { background: #fff7e0; }
.note { background: #fff7e0; border: 1px solid #ecdca8; border-radius: 8px; padding: 8px 14px; }
.columns { columns: 340px; column-gap: 20px; } .columns table { width: 100%; }
.columns tr { break-inside: avoid; } .columns td:first-child { white-space: nowrap; }
"""


def page(title: str, sections: list[str]) -> str:
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            # Should anything here ever name another place, the browser will not go there.
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "img-src data:; style-src 'unsafe-inline'\">"
            f"<title>{text(title)}</title><style>{STYLE}</style></head><body>\n"
            + "\n".join(section for section in sections if section) + "\n</body></html>\n")


def text(found) -> str:
    """Anything -> what a reader sees, and never markup."""
    if isinstance(found, bool):
        return "yes" if found else "no"
    if isinstance(found, float):
        return f"{found:.4g}" if abs(found) < 1e4 else f"{found:,.0f}"
    if isinstance(found, int):
        return f"{found:,}"
    if isinstance(found, (list, tuple)):
        return ", ".join(map(text, found))
    return html.escape("-" if found is None else str(found))


def table(rows: list, head: list = (), told: set = frozenset()) -> str:
    """rows: lists of cells. told: the first cells of rows that are to catch the eye."""
    lines = ["<tr>" + "".join(f"<th>{text(cell)}</th>" for cell in head) + "</tr>"] if head else []
    for row in rows:
        mark = ' class="told"' if row[0] in told else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def figures(pairs: list) -> str:
    """[(what, number)] in boxes; numbers that are None are left out."""
    boxes = "".join(f'<div class="figure"><b>{text(number)}</b>{text(what)}</div>'
                    for what, number in pairs if number is not None)
    return f'<div class="figures">{boxes}</div>'


def picture(file: Path) -> str:
    """An image of this directory, within the page; a sentence when it is not there."""
    try:
        data = base64.b64encode(file.read_bytes()).decode("ascii")
    except OSError:
        return '<p class="quiet">the picture is not there any more</p>'
    kind = {"jpg": "jpeg"}.get(file.suffix[1:], file.suffix[1:])
    return f'<img alt="" src="data:image/{kind};base64,{data}">'
