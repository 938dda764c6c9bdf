"""The corpora: real text, kept apart from what the base was trained on."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from symbiosis.errors import ConfigurationError, MissingCorpusError
from symbiosis.simulations import corpora
from symbiosis.simulations.corpora import HELD_OUT_PACKAGES, base_training_text, read_corpus, split_blocks

STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="module")
def base_documents() -> list[str]:
    return base_training_text()


@pytest.mark.parametrize("name", HELD_OUT_PACKAGES)
def test_a_held_out_package_has_text_to_learn_from(name: str):
    text = read_corpus(name)
    assert len(text) >= 150_000
    assert (STANDARD_LIBRARY / name / "__init__.py").read_text(encoding="utf-8") in text
    assert read_corpus(name) == text


@pytest.mark.parametrize("name", HELD_OUT_PACKAGES)
def test_the_base_never_read_a_held_out_file(name: str, base_documents: list[str]):
    seen = {document.strip() for document in base_documents}
    for path in (STANDARD_LIBRARY / name).rglob("*.py"):
        assert path.read_text(encoding="utf-8").strip() not in seen, path


def test_the_base_text_is_code_of_many_files_and_always_the_same(base_documents: list[str]):
    assert sum(map(len, base_documents)) > 4_000_000
    assert len(base_documents) > 200
    assert all(document.strip() for document in base_documents)
    assert base_documents == base_training_text()


@pytest.mark.parametrize(
    ("relative", "allowed"),
    [
        ("argparse.py", True),
        ("json/decoder.py", True),
        ("concurrent/futures/thread.py", True),
        ("xmlrpc/client.py", True),  # only the folder called xml is held out
        ("email/parser.py", False),
        ("test/test_email/test_email.py", False),
        ("site-packages/torch/__init__.py", False),
        ("encodings/utf_8.py", False),
        ("pydoc_data/topics.py", False),
        ("_sysconfigdata__linux_x86_64-linux-gnu.py", False),
        ("html/entities.py", False),
        ("idlelib/idle_test/test_text.py", False),
        ("__pycache__/odd.py", False),
    ],
)
def test_tables_tests_and_held_out_packages_are_kept_from_the_base(
    relative: str, allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "lib" / relative
    file.parent.mkdir(parents=True)
    file.write_text("print('only this')\n")
    monkeypatch.setattr(corpora, "_standard_library", lambda: tmp_path / "lib")
    if allowed:
        assert base_training_text() == ["print('only this')\n"]
    else:
        with pytest.raises(MissingCorpusError):
            base_training_text()


@pytest.mark.parametrize("name", ["", "no-such-package", "json", "e" * 5000, "nul\0byte"])
def test_an_unknown_corpus_names_those_that_exist(name: str):
    with pytest.raises(MissingCorpusError) as caught:
        read_corpus(name)
    assert all(package in caught.value.next_action for package in HELD_OUT_PACKAGES)


def test_a_package_is_read_in_path_order_without_tests_and_other_encodings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = tmp_path / "test" / "email"  # a folder called test above the library skips nothing
    for name in ("b.py", "a/z.py", "a.py", "tests/t.py", "test/t.py", "__pycache__/c.py", "note.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{name}\n")
    (root / "latin.py").write_bytes(b"caf\xe9")
    monkeypatch.setattr(corpora, "_standard_library", lambda: tmp_path / "test")
    assert read_corpus("email") == "a/z.py\n\na.py\n\nb.py\n"


def test_a_python_without_its_sources_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(corpora, "_standard_library", lambda: tmp_path)
    for call in (base_training_text, lambda: read_corpus("email")):
        with pytest.raises(MissingCorpusError, match=r"sources|no text"):
            call()


def test_a_tenant_brings_a_folder_or_a_file(tmp_path: Path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "letter.txt").write_text("Dear Sir,\n", encoding="utf-8")
    (tmp_path / "tests" / "code.py").write_text("x = 'ü'\n", encoding="utf-8")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    assert read_corpus(str(tmp_path)) == "Dear Sir,\n\nx = 'ü'\n"
    assert read_corpus(str(tmp_path / "letter.txt")) == "Dear Sir,\n"


@pytest.mark.parametrize(("name", "content"), [("a.png", b"\x89PNG"), ("a.txt", b"\xff\xfe"), ("a.py", b" \n")])
def test_a_file_without_text_is_refused(name: str, content: bytes, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MissingCorpusError, match=name):
        read_corpus(str(tmp_path / name))


@given(
    length=st.integers(0, 400),
    block_tokens=st.integers(1, 40),
    every=st.integers(2, 12),
    seed=st.integers(0, 2**32),
)
def test_blocks_cover_the_tokens_once(length: int, block_tokens: int, every: int, seed: int):
    tokens = list(range(length))
    random.Random(seed).shuffle(tokens)  # every token is another number, so that a position is known by its value
    train, held_out = split_blocks(tuple(tokens), block_tokens=block_tokens, every=every)
    count = length // block_tokens
    assert all(len(block) == block_tokens for block in train + held_out)
    assert len(held_out) == count // every
    assert len(train) == count - count // every
    expected = iter(tokens)
    sources = {False: iter(train), True: iter(held_out)}
    for index in range(count):
        assert next(sources[index % every == every - 1]) == [next(expected) for _ in range(block_tokens)]


@pytest.mark.parametrize(("block_tokens", "every"), [(0, 8), (-1, 8), (4, 1), (4, 0)])
def test_a_split_that_cannot_be_is_refused(block_tokens: int, every: int):
    with pytest.raises(ConfigurationError) as caught:
        split_blocks([1, 2, 3], block_tokens=block_tokens, every=every)
    assert caught.value.next_action
