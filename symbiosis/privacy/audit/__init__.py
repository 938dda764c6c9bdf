"""The audit: attacks on what a host saw, honest figures of what they recover, and reports of both.

`finding.py` is what an attack says, `statistics.py` how sure it is, `evidence.py` what an attacker holds and what only
the auditor knows, `attack.py` what an attack is and how attacks are run. Each attack is a module of its own.
"""
