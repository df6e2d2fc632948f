"""Reports: from plain results to a terminal table and one self-contained HTML page; no torch."""
