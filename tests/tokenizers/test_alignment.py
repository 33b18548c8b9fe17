"""Texts aligned between tokenizers by exact bytes, and what cannot be aligned."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from limbeck.errors import ConfigError
from limbeck.tokenizers import Aligner, TokenBytes
from limbeck.tokenizers.alignment import chunk_ends
from tests.models.tiny import tiny_tokenizer
from tests.tokenizers.assorted import byte_bpe, corpus, random_texts, tokenizers, wrap_plain
from tests.tokenizers.small import BEGIN, END, TURN, backend, small

PAIRS = [
    ("bpe", "small bpe"),
    ("small bpe", "unigram"),
    ("digits", "bpe"),
    ("unigram", "digits"),
    ("always", "prefix space"),
    ("prefix space", "llama 2"),
    ("llama 2", "bpe"),
]


def aligner(student, teacher, **options):
    sides = TokenBytes(student, "student"), TokenBytes(teacher, "teacher")
    return Aligner(*sides, **options)


def named(student, teacher):
    return aligner(tokenizers()[student], tokenizers()[teacher])


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def spelt(side, ids, edges):
    """The bytes of each token; a space that was put in front is taken off."""
    lengths = np.diff(edges, prepend=0)
    pieces = [side.bytes_of[i] for i in ids]
    return [b[len(b) - n :] for b, n in zip(pieces, lengths, strict=True)]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_texts_in_all_scripts_align_byte_by_byte(student, teacher):
    pair, tokenizer = named(student, teacher), tokenizers()[student]
    texts = [*random_texts(500), *corpus()[:4]]
    stretches = [ids_of(tokenizer, text) for text in texts]
    num_common = num_tokens = 0
    for text, ids, found in zip(texts, stretches, pair.align(stretches), strict=True):
        assert not isinstance(found, str), (text, found)
        ours = spelt(pair.student, ids, found.student_edges)
        theirs = spelt(pair.teacher, found.teacher_ids, found.teacher_edges)
        assert b"".join(ours) == b"".join(theirs)
        assert b"".join(ours).decode() in (text, f" {text}")
        ends = chunk_ends(found.student_edges, found.teacher_edges).tolist()
        assert set(ends) == set(found.student_edges) & set(found.teacher_edges) - {0}
        chunks = [
            by_chunk(side, edges, ends)
            for side, edges in ((ours, found.student_edges), (theirs, found.teacher_edges))
        ]
        assert chunks[0] == chunks[1]
        assert len(chunks[0]) == len(ends)
        num_common += int((found.standing >= 0).sum())
        num_tokens += len(ids)
    assert 0.8 * num_tokens < num_common


def by_chunk(pieces, edges, ends):
    """The bytes of each chunk; a token's chunk is the one that its end lies in."""
    found = dict.fromkeys(ends, b"")
    for piece, chunk in zip(pieces, np.searchsorted(ends, edges).tolist(), strict=True):
        found[ends[chunk]] += piece
    return list(found.values())


@pytest.mark.parametrize(("student", "teacher"), PAIRS[:4])
def test_aligned_positions_have_the_same_bytes_before_them(student, teacher):
    pair, tokenizer = named(student, teacher), tokenizers()[student]
    for text in random_texts(40, seed=1):
        ids = ids_of(tokenizer, text)
        (found,) = pair.align([ids])
        raw = b"".join(pair.student.bytes_of[i] for i in ids)
        for token, standing in enumerate(found.standing):
            ours = b"".join(pair.student.bytes_of[i] for i in ids[: token + 1])
            assert ours == raw[: found.student_edges[token]]
            is_common = found.student_edges[token] in found.teacher_edges
            assert (standing >= 0) == is_common
            assert not is_common or found.teacher_edges[standing] == len(ours)


def test_a_window_may_begin_and_end_within_a_character():
    pair, tokenizer = named("small bpe", "unigram"), tokenizers()["small bpe"]
    text = "Grüße 日本語, 天地玄黃 🎉🎉 données"
    ids = ids_of(tokenizer, text)
    for start in range(0, len(ids), 2):
        for end in range(start + 1, len(ids) + 1):
            (found,) = pair.align([ids[start:end]])
            raw = b"".join(pair.student.bytes_of[i] for i in ids[start:end])
            whole = raw.decode(errors="ignore")
            assert not isinstance(found, str)
            read = "".join(b.decode() for b in [b"".join(spelt_from(pair, found, raw))])
            assert read == whole


def spelt_from(pair, found, raw):
    """The teacher's bytes of a stretch that may begin within a character."""
    first = len(raw) - len(raw.lstrip(bytes(range(0x80, 0xC0))))
    edges = found.teacher_edges - min(first, 3)
    return spelt(pair.teacher, found.teacher_ids, edges)


def test_invalid_utf8_is_not_aligned():
    pair = named("small bpe", "bpe")
    ids = ids_of(tokenizers()["small bpe"], "日 a")
    assert pair.align([[ids[0], *ids[-2:]]]) == ["the student's tokens are no valid UTF-8"]


def begun(tokenizer):
    """The same with a token before every text."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return tokenizer


@pytest.mark.parametrize("student_begins", [True, False])
@pytest.mark.parametrize("teacher_begins", [True, False])
def test_a_beginning_token_on_one_side_only_loses_the_first_position(
    student_begins, teacher_begins
):
    ours, theirs = backend(320), backend(300)
    student = wrap_plain(begun(ours) if student_begins else ours)
    teacher = wrap_plain(begun(theirs) if teacher_begins else theirs)
    ids = student("A still boils")["input_ids"]
    (found,) = aligner(student, teacher).align([ids])
    begin = teacher.convert_tokens_to_ids(BEGIN)
    assert (found.teacher_ids[0] == begin) == teacher_begins
    assert (BEGIN in student.convert_ids_to_tokens(ids)) == student_begins
    assert (found.standing[0] >= 0) == (teacher_begins or not student_begins)
    assert (found.standing[1:] >= 0).all()
    assert len(found.student_edges) == len(ids)
    assert found.student_edges[-1] == found.teacher_edges[-1] == len("A still boils")


def test_the_end_token_is_matched_by_its_role_and_others_by_their_text():
    teacher = tokenizers()["digits"]  # ends with </s>
    pair = aligner(small(), teacher)
    end = small().eos_token_id
    (found,) = pair.align([[*ids_of(small(), "spirit"), end]])
    assert found.teacher_ids[-1] == teacher.eos_token_id
    assert found.standing[-1] == len(found.teacher_ids) - 1
    turn = small().convert_tokens_to_ids(TURN)
    (inside,) = aligner(small(), small()).align([[*ids_of(small(), "a"), turn, end]])
    assert inside.teacher_ids[-2:].tolist() == [turn, end]


def test_a_special_token_without_counterpart_is_named():
    turn = small().convert_tokens_to_ids(TURN)
    pair = aligner(small(), tokenizers()["bpe"])
    stretch = [*ids_of(small(), "a"), turn, *ids_of(small(), "b")]
    assert pair.align([stretch]) == [
        f"the student's special token {TURN!r} has no counterpart in the teacher"
    ]
    (last,) = pair.align([stretch[:-1]])  # nothing is read after it
    assert last.standing.tolist()[-1] == -1


def test_a_literal_added_token_in_a_text_is_its_bytes():
    pair = aligner(tokenizers()["digits"], tokenizers()["bpe"])  # whose end is another
    text = f"before {END} after {END}"
    (found,) = pair.align([ids_of(tokenizers()["digits"], text)])
    assert tokenizers()["bpe"].eos_token_id in found.teacher_ids
    assert b"".join(spelt(pair.teacher, found.teacher_ids, found.teacher_edges)).decode() == text


def test_a_normaliser_that_changes_a_text_is_named():
    (found,) = named("bpe", "nfc").align([ids_of(tokenizers()["bpe"], "cafe\u0301")])
    assert found == "the teacher's tokenizer changes it (NFC) before it reads it"
    (found,) = named("bpe", "nfc").align([ids_of(tokenizers()["bpe"], "caf\u00e9")])
    assert not isinstance(found, str)


def test_bytes_that_the_teacher_drops_are_named():
    backend_ = Tokenizer(models.BPE())
    backend_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend_.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=[END], show_progress=False)
    backend_.train_from_iterator(["plain words only, in ASCII"] * 5, trainer)
    teacher = wrap_plain(backend_)
    assert "\u00fc" not in teacher.decode(ids_of(teacher, "plain \u00fc"))
    found = aligner(small(), teacher).align([ids_of(small(), "plain \u00fc")])
    assert found == ["the teacher's tokenizer has no token for its bytes 0xBC, 0xC3"]


def test_an_unknown_token_is_not_aligned():
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("\u2581", -2.0)], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    student = wrap_plain(tokenizer, end="a")
    reason = "the {}'s tokenizer has no token for a part of it"
    for pair, who in (
        (aligner(student, small()), "student"),
        (aligner(small(), student), "teacher"),
    ):
        ids = ids_of(student if who == "student" else small(), "a b")
        assert pair.align([ids]) == [reason.format(who)]


def test_more_tokens_than_the_teacher_reads_are_named():
    pair = aligner(small(), small(), max_teacher_tokens=4)
    short, long = ids_of(small(), "a")[:4], ids_of(small(), "A large thing fits")
    found = pair.align([short, long])
    assert not isinstance(found[0], str)
    assert "which reads at most 4; lower data.sequence_length" in found[1]


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_tokenizer_that_loses_bytes_is_refused_by_name(who):
    with pytest.raises(ConfigError, match=f"The {who}'s tokenizer .* a WordLevel model loses"):
        TokenBytes(tiny_tokenizer(), who)


def test_dropout_is_refused():
    tokenizer = byte_bpe(300)
    tokenizer.model.dropout = 0.1
    with pytest.raises(ConfigError, match="it has dropout"):
        TokenBytes(wrap_plain(tokenizer), "student")
