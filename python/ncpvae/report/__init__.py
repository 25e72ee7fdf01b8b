"""One self-contained HTML page about a run: figures, tables and how to read them. Pure data in, a file out.

`content` says what a page can hold, `charts` and `pictures` draw it, `page` puts it together with page.html and
page.css. Needs matplotlib: pip install 'ncpvae[plot]'.
"""

from .content import GroupFigures, Metric, ReportData, Samples
from .page import write_report

__all__ = ["GroupFigures", "Metric", "ReportData", "Samples", "write_report"]
