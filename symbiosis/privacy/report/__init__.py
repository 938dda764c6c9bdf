"""What an audit found, for people who sign: JSON, SARIF and one HTML page, judged by a policy and signed.

`model.py` is the report, `build.py` makes one from what an audit has in hand, `policy.py` judges, `files.py` writes and
reads; `sarif.py`, `html.py` and `sign.py` make one of the files each. docs/audit-report.md says how to read them.
"""
