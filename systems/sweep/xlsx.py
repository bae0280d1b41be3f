"""Spreadsheets in Office Open XML (ECMA-376), as far as a table needs them: numbers, text, bold, links.

A file is a zip of XML parts. Text stands in the cells themselves (``t="inlineStr"``) rather than in a shared
table, which every spreadsheet program reads and none has to be told about.
"""

import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

_MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_DOCUMENT = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006"
_TYPE = "application/vnd.openxmlformats-officedocument.spreadsheetml"
_HEAD = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
_PLAIN, _BOLD, _LINK = range(3)

# Cell formats by number: plain, bold, link.
_STYLES = f"""{_HEAD}<styleSheet xmlns="{_MAIN}"><fonts count="3">
<font><sz val="11"/><name val="Calibri"/></font>
<font><b/><sz val="11"/><name val="Calibri"/></font>
<font><u/><sz val="11"/><color rgb="FF0563C1"/><name val="Calibri"/></font></fonts>
<fills count="2"><fill><patternFill patternType="none"/></fill>
<fill><patternFill patternType="gray125"/></fill></fills>
<borders count="1"><border><left/><right/><top/><bottom/><diagonal/></border></borders>
<cellStyleXfs count="1"><xf numFmtId="0" fontId="0" fillId="0" borderId="0"/></cellStyleXfs>
<cellXfs count="3"><xf numFmtId="0" fontId="0" fillId="0" borderId="0" xfId="0"/>
<xf numFmtId="0" fontId="1" fillId="0" borderId="0" xfId="0" applyFont="1"/>
<xf numFmtId="0" fontId="2" fillId="0" borderId="0" xfId="0" applyFont="1"/></cellXfs>
<cellStyles count="1"><cellStyle name="Normal" xfId="0" builtinId="0"/></cellStyles></styleSheet>"""


@dataclass(frozen=True)
class Cell:
    """What stands in one cell."""

    value: str | int | float | bool | None
    is_bold: bool = False
    link: str | None = None
    """URL, or a path relative to the spreadsheet."""


def write_xlsx(path: Path, sheets: Mapping[str, Sequence[Sequence[Cell]]]) -> None:
    """Write sheets of cells; the first row of each stays in view when the others are scrolled.

    Args:
        path: of the file, replaced if it exists.
        sheets: rows of cells by the sheet's name (at most 31 characters, none of ``[ ] : * ? / \\``).

    Raises:
        ValueError: there is no sheet, or a name that spreadsheets do not allow.
        OSError: the file cannot be written.
    """
    if not sheets or any(not re.fullmatch(r"[^\[\]:*?/\\]{1,31}", name) for name in sheets):
        raise ValueError(f"sheets need names of 1 to 31 characters without []:*?/\\, got {list(sheets)}")
    numbers = range(1, len(sheets) + 1)
    parts = {
        "[Content_Types].xml": _content_types(numbers),
        "_rels/.rels": _relationships([(f"{_DOCUMENT}/officeDocument", "xl/workbook.xml", False)]),
        "xl/workbook.xml": _workbook(list(sheets)),
        "xl/_rels/workbook.xml.rels": _relationships(
            [(f"{_DOCUMENT}/worksheet", f"worksheets/sheet{number}.xml", False) for number in numbers]
            + [(f"{_DOCUMENT}/styles", "styles.xml", False)]
        ),
        "xl/styles.xml": _STYLES,
    }
    for number, rows in zip(numbers, sheets.values(), strict=True):
        links = [cell.link for row in rows for cell in row if cell.link]
        parts[f"xl/worksheets/sheet{number}.xml"] = _sheet(rows)
        if links:
            parts[f"xl/worksheets/_rels/sheet{number}.xml.rels"] = _relationships(
                [(f"{_DOCUMENT}/hyperlink", link, True) for link in links]
            )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in parts.items():
            # A fixed date: the same table gives the same bytes.
            file.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)


def _content_types(numbers: range) -> str:
    overrides = [("/xl/workbook.xml", "sheet.main"), ("/xl/styles.xml", "styles")]
    overrides += [(f"/xl/worksheets/sheet{number}.xml", "worksheet") for number in numbers]
    return (
        f'{_HEAD}<Types xmlns="{_PACKAGE}/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        '<Default Extension="xml" ContentType="application/xml"/>'
        + "".join(
            f'<Override PartName="{part}" ContentType="{_TYPE}.{kind}+xml"/>' for part, kind in overrides
        )
        + "</Types>"
    )


def _relationships(targets: Sequence[tuple[str, str, bool]]) -> str:
    """Numbered rId1, rId2, ...: type, target, and whether the target lies outside of the file."""
    entries = (
        f'<Relationship Id="rId{number}" Type="{kind}" Target={quoteattr(_clean(target))}'
        + (' TargetMode="External"/>' if is_external else "/>")
        for number, (kind, target, is_external) in enumerate(targets, start=1)
    )
    return f'{_HEAD}<Relationships xmlns="{_PACKAGE}/relationships">{"".join(entries)}</Relationships>'


def _workbook(names: Sequence[str]) -> str:
    sheets = "".join(
        f'<sheet name={quoteattr(name)} sheetId="{number}" r:id="rId{number}"/>'
        for number, name in enumerate(names, start=1)
    )
    return f'{_HEAD}<workbook xmlns="{_MAIN}" xmlns:r="{_DOCUMENT}"><sheets>{sheets}</sheets></workbook>'


def _sheet(rows: Sequence[Sequence[Cell]]) -> str:
    widths = [max(len(str(row[k].value)) for row in rows if k < len(row)) for k in range(_num_columns(rows))]
    columns = "".join(
        f'<col min="{k}" max="{k}" width="{min(max(width, 6), 60) + 2}" customWidth="1"/>'
        for k, width in enumerate(widths, start=1)
    )
    lines: list[str] = []
    links: list[str] = []
    for number, row in enumerate(rows, start=1):
        cells = []
        for k, cell in enumerate(row):
            place = f"{_letters(k)}{number}"
            cells.append(_cell(place, cell))
            if cell.link:
                links.append(f'<hyperlink ref="{place}" r:id="rId{len(links) + 1}"/>')
        lines.append(f'<row r="{number}">{"".join(cells)}</row>')
    # The order of these elements is prescribed (ECMA-376 part 1, 18.3.1.99).
    return (
        f'{_HEAD}<worksheet xmlns="{_MAIN}" xmlns:r="{_DOCUMENT}"><sheetViews><sheetView workbookViewId="0">'
        '<pane ySplit="1" topLeftCell="A2" activePane="bottomLeft" state="frozen"/></sheetView></sheetViews>'
        + (f"<cols>{columns}</cols>" if columns else "")
        + f"<sheetData>{''.join(lines)}</sheetData>"
        + (f"<hyperlinks>{''.join(links)}</hyperlinks>" if links else "")
        + "</worksheet>"
    )


def _num_columns(rows: Sequence[Sequence[Cell]]) -> int:
    return max((len(row) for row in rows), default=0)


def _cell(place: str, cell: Cell) -> str:
    style = _LINK if cell.link else _BOLD if cell.is_bold else _PLAIN
    start = f'<c r="{place}" s="{style}"'
    value = cell.value
    if value is None:
        return start + "/>"
    if isinstance(value, bool):
        return f'{start} t="b"><v>{int(value)}</v></c>'
    # There are no infinite numbers in this format, nor any that are none.
    if isinstance(value, (int, float)) and math.isfinite(value):
        return f"{start}><v>{value!r}</v></c>"
    # A cell holds 32,767 characters at most.
    text = escape(_clean(str(value))[:32767])
    return f'{start} t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'


def _clean(text: str) -> str:
    """Without the control characters that XML 1.0 cannot hold."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", text)


def _letters(column: int) -> str:
    """Name of a column counted from 0: A ... Z, AA ..."""
    name = ""
    column += 1
    while column:
        column, last = divmod(column - 1, 26)
        name = chr(ord("A") + last) + name
    return name
