"""One self-contained HTML page of one or several runs of `hsa eval MODEL --suite`; no network, no libraries."""

from hsa_ultralong.eval.html_report.page import write_page

__all__ = ["write_page"]
