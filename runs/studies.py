"""Write what the package and its docs say of the studies, out of a folder of results.

    addnorm study --all --long --out studies
    .venv/bin/python runs/studies.py studies

Writes `addnorm/studies/verdicts.json`, the last verdicts that `addnorm study` lists where none was
run here, `docs/images/studies/`, and the pages of `docs/` that stand on the verdicts, each in both
languages: studies, gallery, errata, glossary, reading. Studies without a result in the folder are
named and left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

from addnorm.files import write_json, write_text
from addnorm.reports.errata import write_docs
from addnorm.reports.study_docs import gallery_markdown, study_markdown, write_picture
from addnorm.studies import all_studies
from addnorm.studies.errata import check_errata
from addnorm.studies.running import claim_verdicts, last_results, summary
from addnorm.studies.texts import load_glossary, load_reading

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PICTURES = DOCS / "images" / "studies"
SUFFIX = {"en": "", "zh": ".zh-CN"}


def main(out: Path) -> int:
    results = last_results(out)
    if not results:
        print(f"no result of a study in {out}", file=sys.stderr)
        return 2
    missing = {study.name for study in all_studies()} - {result["name"] for result in results}
    if missing:
        print(f"no result in {out}: {', '.join(sorted(missing))}", file=sys.stderr)
    rows = list(map(summary, results))
    write_json(ROOT / "addnorm" / "studies" / "verdicts.json", rows)
    errata = check_errata(claim_verdicts(rows))
    write_docs(DOCS, errata, load_glossary(), load_reading())
    for lang in ("en", "zh"):
        write_text(DOCS / f"studies{SUFFIX[lang]}.md", study_markdown(results, lang))
        write_text(DOCS / f"gallery{SUFFIX[lang]}.md", gallery_markdown(results, lang))
        for result in results:
            write_picture(result, PICTURES, lang)
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python runs/studies.py FOLDER")
    sys.exit(main(Path(sys.argv[1])))
