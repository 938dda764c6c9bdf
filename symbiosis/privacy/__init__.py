"""How rows are hidden, what left (the ledger), and how both are checked.

from symbiosis.privacy import read_transcript
"""

from symbiosis.privacy.mechanism import Mechanism, Plaintext
from symbiosis.privacy.transcript import RecordedFrame, Transcript, read_transcript

__all__ = ["Mechanism", "Plaintext", "RecordedFrame", "Transcript", "read_transcript"]
