"""Evaluation tasks: what is asked, what is kept out, and that lm_eval can read them."""

import json
import re
import runpy
import shutil
import subprocess
import sys

import pytest

from illada import cli
from illada.data.corpus import prepare
from illada.data.dataset import TokenDataset
from illada.evaluation.dictionaries import Entry, read_docstrings, read_wordnet
from illada.evaluation.questions import cloze_questions, definition_questions
from illada.evaluation.tasks import _documents, _seen_in_training, prepare_tasks


def module(number):
    """A Python file with two functions, a class and running text of its own."""
    words = [f"w{chr(97 + i % 26)}{chr(97 + (number * 7 + i * i) % 26)}{number}" for i in range(120)]
    words = [re.sub(r"\d", lambda digit: "qrstuvwxyz"[int(digit[0])], word) for word in words]
    lines = [" ".join(words[i : i + 4]) + "\u2028" + " ".join(words[i + 4 : i + 12]) for i in range(0, 120, 12)]
    prose = "\n".join("# " + line for line in lines)  # U+2028 ends a line for Unicode, but not in JSON
    return (
        f'def open_{number}_gate(x):\n    """Swing gate number {number} wide {words[3]}.\n\n    More."""\n'
        f'def shut_{number}_gate(x):\n    """Pull gate number {number} to {words[4]}."""\n'
        f'class Gate{number}Keeper:\n    """The person who minds gate number {number}."""\n'
        f'    def _hidden(self):\n        """Nobody is ever asked about this one."""\n{prose}\n'
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("some tasks")
    lines = [json.dumps({"text": module(i)}) for i in range(150)]
    (root / "text.jsonl").write_text("\n".join(lines))
    prepare(f"jsonl:{root}/text.jsonl", root / "corpus", vocab_size=400, validation_fraction=0.3, progress=False)
    return root / "corpus"


@pytest.fixture(scope="module")
def tasks(corpus):
    assert set(prepare_tasks(corpus, questions=40)) == {"definitions", "cloze", "cloze_word"}
    return corpus / "tasks"


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]


def test_same_corpus_same_bytes(corpus, tasks, tmp_path):
    before = {file.name: file.read_bytes() for file in tasks.iterdir()}
    assert {"definitions.yaml", "cloze.jsonl", "read_jsonl.py"} <= set(before)
    with pytest.raises(FileExistsError, match="overwrite"):
        prepare_tasks(corpus, ["cloze"])
    assert prepare_tasks(corpus, questions=40, overwrite=True) == dict.fromkeys(
        ("definitions", "cloze", "cloze_word"), 40
    )
    assert {file.name: file.read_bytes() for file in tasks.iterdir()} == before
    other = definition_questions(read_docstrings([module(i) for i in range(9)]), seed=1)
    assert other != definition_questions(read_docstrings([module(i) for i in range(9)]), seed=0)


def test_questions_come_from_held_out_text_alone(corpus, tasks):
    held_out = list(_documents(TokenDataset(corpus, "validation")))
    train = "\n".join(_documents(TokenDataset(corpus, "train")))
    assert held_out and not set(held_out) & set(_documents(TokenDataset(corpus, "train")))
    for name in ("cloze", "cloze_word"):
        for row in rows(tasks, name):
            right = row["answer"] if name == "cloze_word" else row["choices"][row["answer"]]
            assert any(f"{row['text']} {right}" in document for document in held_out)
            assert f"{row['text']} {right}" not in train
    numbers = {n for document in held_out for n in re.findall(r"open_(\d+)_gate", document)}
    for row in rows(tasks, "definitions"):
        assert {n for word in row["choices"] for n in re.findall(r"\d+", word)} <= numbers
    assert {row["split"] for row in rows(tasks, "cloze")} == {"fewshot", "test"}


def test_text_that_training_saw_is_found(corpus):
    train = TokenDataset(corpus, "train")
    seen = next(iter(_documents(train)))
    sentence = re.search(r'"""(Swing.*?)\.', seen)[1]
    assert _seen_in_training(train, [sentence, sentence + " of course", "never written anywhere at all"]) == {sentence}


def test_docstrings():
    source = (
        'class Box:\n    """A box for small things. It has a lid."""\n'
        '    def lift(self):\n        """lift() -> weight\n\n        Take the thing up\n        by its handle."""\n'
        '    def __len__(self):\n        """How many things there are inside."""\n'
        '    async def fill(self):\n        """Too short."""\n'
    )
    got = {(e.word, e.kind, e.text) for e in read_docstrings([source, "not ( python", ""])}
    assert got == {("Box", "class", "A box for small things."), ("lift", "def", "Take the thing up by its handle.")}


def test_the_word_is_blanked_and_twins_are_not_asked():
    entries = [
        Entry("open_gate", "def", "Call open_gate to swing the gate on its hinge."),
        Entry("copy", "def", "Copies a file, or a copy of one, somewhere."),
        Entry("first_twin", "def", "What these two do is the same."),
        Entry("second_twin", "def", "What these two do is the same."),
        *(Entry(f"other{c}", "def", f"Something else altogether, called by {c}.") for c in "abcdef"),
    ]
    made = {row["choices"][row["answer"]]: row for row in definition_questions(entries)}
    assert made["open_gate"]["text"] == "Call ___ to swing the gate on its hinge."
    assert made["copy"]["text"] == "___ a file, or a ___ of one, somewhere."
    assert not {"first_twin", "second_twin"} & set(made)


def test_distractors():
    entries = [Entry(f"near{c}", "def", f"One of the near ones, number {c}.", group="1") for c in "abcd"]
    entries += [Entry(f"far{c}", "def", f"One of the far ones, number {c}.", group="2") for c in "ab"]
    entries += [Entry("Thing", "class", "A kind of its own, without companions.", group="1")]
    for row in definition_questions(entries):
        right = row["choices"][row["answer"]]
        assert len(set(row["choices"])) == 4 and right != "Thing"  # no class to confuse it with
        if right.startswith("near"):
            assert all(word.startswith("near") for word in row["choices"])  # of the same file
    # A distractor is no word of the definition, and of the two lengths the nearer one is taken.
    words = ["cat", "dog", "owl", "hen", "crocodile", "rhinoceros", "alligator"] + [f"elephant{c}" for c in "abcdefgh"]
    question = definition_questions(
        [Entry(w, "noun", f"An animal, but not hen {i} nor owl.") for i, w in enumerate(words)]
    )
    cat = next(row for row in question if row["choices"][row["answer"]] == "crocodile")
    assert not {"hen", "owl"} & set(cat["choices"]) and "cat" not in cat["choices"]


WORDNET = {
    "data.noun": """\
  1 This software and database is being provided to you, the LICENSEE, by
00001740 03 n 01 entity 0 001 ~ 00001930 n 0000 | that which is perceived to have its own distinct existence
00001930 03 n 02 thing 0 matter 3 001 @ 00001740 n 0000 | a separate and self-contained object; "it was full of rackets, balls and other things"
02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 002 @ 02083346 n 0000 + 00001111 a 0101 | a member of the genus Canis that barks; "the dog barked all night"
02083346 05 n 02 canine 1 canid 0 001 ~ 02084071 n 0000 | any of various fissiped mammals with long muzzles
02121620 05 n 01 cat 0 000 | feline mammal usually having thick soft fur; "a cat purred"
01882714 05 n 01 koala 0 000 | sluggish tailless Australian arboreal marsupial with grey ears
02342885 05 n 01 hamster 0 000 | short-tailed Old World burrowing rodent with large pouches
01322604 05 n 01 puppy 0 001 @ 02084071 n 0000 | a young animal of the barking kind
""",
    "data.adj": """\
00001111 00 a 02 doggy(p) 0 canine 0 002 + 02084071 n 0101 & 00002222 s 0000 | of or resembling animals that bark
00002222 00 s 01 houndlike 0 001 & 00001111 a 0000 | very much as hounds are when hunting
""",
    "index.noun": """\
  1 This software and database is being provided to you, the LICENSEE, by
canine n 1 1 ~ 2 1 02083346 00001930
dog n 1 2 @ ~ 1 1 02084071
canid n 1 1 @ 1 0 02083346
entity n 1 1 ~ 1 1 00001740
""",
    "cntlist.rev": """\
canine%1:05:01:: 2 1
dog%1:05:00:: 1 42
doggy%3:00:00:: 1 3
houndlike%5:00:00:bark:00 1 1
entity%1:03:00:: 1 11
cat%1:05:00:: 1 18
koala%1:05:00:: 1 2
hamster%1:05:00:: 1 2
puppy%1:05:00:: 1 5
thing%1:03:00:: 12 9
""",
}


@pytest.fixture
def wordnet(tmp_path):
    for name, text in WORDNET.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_wordnet_files(wordnet):
    entries = {(e.word, e.kind): e for e in read_wordnet(wordnet)}
    dog = entries["dog", "noun"]
    assert dog.text == "a member of the genus Canis that barks" and dog.frequency == 42
    assert {"canine", "canid", "domestic_dog"} <= dog.related and "cat" not in dog.related
    assert ("doggy", "adjective") in entries  # "doggy(p)" in the file
    assert {"houndlike"} <= entries["doggy", "adjective"].related  # satellites are adjectives too
    assert entries["canine", "noun"].text.startswith("any of various")  # its first sense, by index.noun
    assert ("matter", "noun") not in entries and ("canid", "noun") not in entries  # never met in tagged text
    assert not [word for word, _ in entries if "_" in word or word != word.lower()]
    questions = {row["choices"][row["answer"]]: row for row in definition_questions(list(entries.values()))}
    assert "canine" not in questions["dog"]["choices"] and "puppy" not in questions["dog"]["choices"]
    (wordnet / "cntlist.rev").unlink()
    assert ("canid", "noun") in {(e.word, e.kind) for e in read_wordnet(wordnet)}


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("data.noun", "n 01 ", "n zz "),
        ("data.noun", "n 01 ", ""),
        ("data.noun", "n 01 ", "n -1 "),
        ("index.noun", "dog n 1 2 @", "dog n 1 900 @"),
        ("index.noun", "02084071", "7"),
        ("cntlist.rev", "dog%1", "dog%9"),
        ("cntlist.rev", " 1 42", ""),
    ],
)
def test_wordnet_files_that_are_damaged_are_named(wordnet, name, old, new):
    (wordnet / name).write_text(WORDNET[name].replace(old, new))
    with pytest.raises(ValueError, match=rf"{name}(, line \d+ is not in WordNet's format| gives 'dog' the sense 7)"):
        read_wordnet(wordnet)


@pytest.mark.parametrize("line", ["{", "3", "[]", "null", "{}", '{"split": []}', "[" * 100000], ids=str.__len__)
def test_damaged_questions_are_named(line, tasks, tmp_path):
    """By the reader that lies beside them, which needs no illada."""
    namespace = runpy.run_path(str(shutil.copy(tasks / "read_jsonl.py", tmp_path)))
    (tmp_path / "q.jsonl").write_text('{"split": "test", "text": "x"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match="q.jsonl, line 3, is no JSON object with a split"):
        namespace["read"]("q.jsonl")
    (tmp_path / "q.jsonl").write_bytes(b'\r\n{"split": "\xff"}\n')
    with pytest.raises(ValueError, match="q.jsonl, line 2, is no JSON object with a split: UnicodeDecodeError"):
        namespace["read"]("q.jsonl")
    (tmp_path / "q.jsonl").write_text('{"split": "test", "text": "x"}\n{"split": "test", "text": [3]}\n')
    with pytest.raises(ValueError, match="q.jsonl has rows whose values are of different types: "):
        namespace["read"]("q.jsonl")


def test_cloze_passages():
    text = "\n".join(" ".join(f"l{i}w{j}" for j in range(10)) for i in range(60))
    other = "\n".join(" ".join(f"k{i}v{j}" for j in range(10)) for i in range(60))
    for row in cloze_questions([text, other]):
        right = row["choices"][row["answer"]]
        assert len(row["text"].split()) == 24 and 3 <= len(right.split()) <= 8
        source, elsewhere = (text, other) if row["text"] in text else (other, text)
        assert f"{row['text']} {right}" in source
        assert all(choice in elsewhere for choice in row["choices"] if choice != right)
    prose = "the quick brown fox jumps over a lazy dog and runs " * 40
    assert all(re.fullmatch(r"[a-z]{3,}", row["answer"]) for row in cloze_questions([prose], word=True))


def test_lm_eval_reads_the_folder_wherever_it_is(tasks, tmp_path):
    assert any("\u2028" in row["text"] for row in rows(tasks, "cloze"))
    moved = tmp_path / "moved to here" / "tasks"
    shutil.copytree(tasks, moved)
    code = (
        "import sys; from lm_eval.tasks import TaskManager\n"
        "manager = TaskManager(include_path=sys.argv[1], include_defaults=False)\n"
        "loaded = manager.load(['definitions', 'cloze', 'cloze_word'])['tasks']\n"
        "for name, task in sorted(loaded.items()):\n"
        "    docs = list(task.test_docs())\n"
        "    print(name, task.OUTPUT_TYPE, len(docs), len(list(task.fewshot_docs())), repr(task.doc_to_text(docs[0])))\n"
    )
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code, moved], capture_output=True, text=True, cwd=tmp_path, env=offline
    )
    assert done.returncode == 0, done.stderr
    cloze, word, definitions = done.stdout.splitlines()
    assert cloze.startswith("cloze multiple_choice 40 8") and word.startswith("cloze_word generate_until 40 8")
    assert definitions.startswith("definitions multiple_choice 40 8") and re.search(
        r"'# .*\\n(def|class)'$", definitions
    )


def test_command(corpus, tasks, wordnet, capsys, monkeypatch):
    many = [f"{i:08} 05 n 01 beast{c}{d} 0 000 | an animal of the kind number {i} of all" for i, (c, d) in
            enumerate((c, d) for c in "abcdefg" for d in "hijklm")]  # fmt: skip
    (wordnet / "data.noun").write_text("\n".join(many) + "\n")
    (wordnet / "index.noun").unlink()
    (wordnet / "cntlist.rev").unlink()
    base = ["prepare", "--out", str(corpus), "--overwrite", "--questions", "20"]
    monkeypatch.setenv("HOME", str(wordnet.parent))  # a shell leaves the ~ in wordnet:~ alone
    assert cli.main([*base, "--tasks", "definitions", "--dictionary", f"wordnet:~/{wordnet.name}"]) == 0
    assert re.search(r"definitions +20 questions", capsys.readouterr().out)
    assert rows(corpus / "tasks", "definitions")[0]["kind"] == "noun" and len(rows(corpus / "tasks", "cloze")) == 48
    assert cli.main([*base, "--tasks", "all"]) == 0
    assert sorted(p.name for p in (corpus / "tasks").glob("*.yaml")) == [
        "cloze.yaml",
        "cloze_word.yaml",
        "definitions.yaml",
    ]
    errors = [
        (["prepare", "--out", str(corpus)], "prepare needs --source"),
        ([*base, "--tasks", "arc"], "tasks must be some of definitions, cloze, cloze_word, got 'arc'"),
        ([*base, "--tasks", "cloze", "--questions", "3"], "questions must be at least 20"),
        ([*base, "--tasks", "definitions", "--dictionary", "oxford"], "dictionary must be docstrings or wordnet:PATH"),
        ([*base, "--tasks", "definitions", "--dictionary", f"wordnet:{corpus}"], "has no data.noun"),
        (["prepare", "--out", str(wordnet), "--tasks", "cloze"], "is not a corpus"),
    ]
    for arguments, message in errors:
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err


def test_too_little_text(tmp_path):
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": f"a b c {i} " * 20}) for i in range(30)))
    prepare(f"jsonl:{tmp_path}/t.jsonl", tmp_path / "c", vocab_size=300, validation_fraction=0.2, progress=False)
    with pytest.raises(ValueError, match=r"gives 0 questions for task definitions.*hold out more"):
        prepare_tasks(tmp_path / "c", ["definitions"])
    with pytest.raises(ValueError, match=r"gives 0 questions for task definitions, \d+ questions for task cloze, "):
        prepare_tasks(tmp_path / "c")
    assert not (tmp_path / "c" / "tasks").exists()


def test_all_is_what_there_is_text_for(tmp_path, capsys):
    prose = [re.sub(r'""".*?"""', "pass", module(i), flags=re.DOTALL) for i in range(40)]  # nothing is defined
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in prose))
    prepare(f"jsonl:{tmp_path}/t.jsonl", tmp_path / "c", vocab_size=400, validation_fraction=0.5, progress=False)
    assert cli.main(["prepare", "--out", str(tmp_path / "c"), "--tasks", "all", "--questions", "20"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"cloze +20 questions\ncloze_word +20 questions\ndefinitions +left out: too few", said)
    assert {path.stem for path in (tmp_path / "c" / "tasks").glob("*.yaml")} == {"cloze", "cloze_word"}
    with pytest.raises(ValueError, match="gives 0 questions for task definitions"):  # one that is named is not left out
        prepare_tasks(tmp_path / "c", ["cloze", "definitions"], overwrite=True)
