"""A task inside a chat template: the same text, the same spans, one beginning of the sequence."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

import spd
from spd.spans import encode_examples
from spd.tasks.base import Question, Task
from spd.tasks.chat import ChatTask

TURNED = (  # a system turn of its own, nothing stripped, a new line at the end
    "{{ '<|open|>system\nBe short.<|close|>\n' }}{% for turn in messages %}"
    "{{ '<|open|>' + turn['role'] + '\n' + turn['content'] + '<|close|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|open|>assistant\n' + ('<|none|>' if no_thinking else '') }}{% endif %}"
)
HEADED = (  # opens with the token that the tokenizer adds too, strips, two new lines at the end
    "{{ bos_token }}{% for turn in messages %}{{ '<|head|>' + turn['role'] + '<|tail|>\n\n' }}"
    "{{ turn['content'] | trim + '<|over|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|tail|>\n\n' }}{% endif %}"
)
BRACKETED = (  # no blank before the answer
    "{{ bos_token }}{% for turn in messages %}{{ '[ASK] ' + turn['content'].rstrip() + ' [/ASK]' }}{% endfor %}"
)
TEMPLATES = {"turned": TURNED, "headed": HEADED, "bracketed": BRACKETED}


class Made(Task):
    """Whatever examples it is given, judged by what a question says."""

    name = "made"
    max_new_tokens = 7
    calibration_size = 3
    test_size = 2
    stop = ("!",)
    metric = "nll"
    runs_code = True
    sub_tasks = ("a", "b")

    def __init__(self, examples=()):
        self.examples = list(examples)

    def calibration(self):
        return self.examples

    def training_prompts(self):
        return [example.prompt for example in self.examples]

    def test(self):
        return [Question(example.prompt, example.completion, "group") for example in self.examples]

    def is_correct(self, completion, question):
        return completion == question.prompt + question.reference

    def judge(self, completions, questions):
        return [None, *(super().judge(completions[1:], questions[1:]))]


@pytest.fixture(scope="module")
def chat_tokenizer(tokenizer):
    """`chat_tokenizer(template, adds)`: with a token for the beginning of a text, which it adds or leaves to others."""

    def make(template, adds):
        made = copy.deepcopy(tokenizer)
        made.add_special_tokens({"bos_token": "<s>"})
        if adds:
            made.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
            )
        made.chat_template = TEMPLATES.get(template, template)
        return made

    return make


def spanned(example):
    return [example.text[start:end] for start, end in example.spans]


EXAMPLE = spd.Example("Question: 2 + 3?\nAnswer:", " it is\n#### 5", [(10, 15), (36, 37)])


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            "turned",
            "<|open|>system\nBe short.<|close|>\n<|open|>user\nQuestion: 2 + 3?\nAnswer:<|close|>\n"
            "<|open|>assistant\nit is\n#### 5",
        ),
        (
            "headed",
            "<|head|>user<|tail|>\n\nQuestion: 2 + 3?\nAnswer:<|over|><|head|>assistant<|tail|>\n\nit is\n#### 5",
        ),
        ("bracketed", "[ASK] Question: 2 + 3?\nAnswer: [/ASK] it is\n#### 5"),
    ],
)
def test_text_and_spans_inside_the_template(template, text, adds, chat_tokenizer):
    tokenizer = chat_tokenizer(template, adds)
    assert spanned(EXAMPLE) == ["2 + 3", "5"]
    task = ChatTask(Made([EXAMPLE]), tokenizer)
    (example,), (prompt,), (question,) = task.calibration(), task.training_prompts(), task.test()
    written = "" if adds or template == "turned" else "<s>"
    assert example.text == written + text
    assert spanned(example) == ["2 + 3", "5"]
    assert prompt == example.prompt == question.prompt
    assert question.reference == example.completion, "what a likelihood is taken of"
    tokens = tokenizer(prompt)["input_ids"]
    expected = 0 if template == "turned" and not adds else 1
    assert tokens.count(tokenizer.bos_token_id) == expected
    assert tokens[:expected] == [tokenizer.bos_token_id] * expected
    assert (
        tokens
        == tokenizer(tokenizer.bos_token * expected + prompt.removeprefix("<s>"), add_special_tokens=False)["input_ids"]
    ), "the same tokens as the template's own text has"
    (encoded,) = encode_examples(tokenizer, [example], max_length=256)
    counted = "".join(tokenizer.decode([encoded.tokens[t]]) for t in encoded.targets)
    assert counted.split() == ["2", "+", "35"]


def test_a_template_that_opens_twice_is_refused(chat_tokenizer):
    tokenizer = chat_tokenizer("{{ bos_token }}" + HEADED, adds=True)
    with pytest.raises(spd.InputError, match="its chat template begins with <s> more than once"):
        ChatTask(Made([EXAMPLE]), tokenizer).test()


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(TEMPLATES)),
    st.booleans(),
    st.text("a \n#", max_size=8),
    st.text("b \n#", max_size=8),
    st.data(),
)
def test_spans_stay_on_their_characters(chat_tokenizer, template, adds, prompt, completion, data):
    """Whatever is stripped: every character that a span marked, and that is still there, is marked, and no other."""
    length = len(prompt + completion)
    edges = st.tuples(st.integers(0, length), st.integers(0, length)).map(sorted).filter(lambda span: span[0] < span[1])
    spans = data.draw(st.lists(edges, max_size=3)) if length else []
    asked = spd.Example(prompt, completion, [tuple(span) for span in spans])
    (example,) = ChatTask(Made([asked]), chat_tokenizer(template, adds)).calibration()
    before = {c for start, end in asked.spans for c in range(start, end)}
    after = {c for start, end in example.spans for c in range(start, end)}
    kept = completion.lstrip() if template != "bracketed" else completion
    assert example.completion == kept
    assert "".join(asked.text[c] for c in sorted(before) if c >= length - len(kept)) == "".join(
        example.text[c] for c in sorted(after) if c >= len(example.prompt)
    )
    in_prompt = "".join(asked.text[c] for c in sorted(before) if c < len(prompt))
    moved = "".join(example.text[c] for c in sorted(after) if c < len(example.prompt))
    assert in_prompt.strip() == moved.strip()
    assert template != "turned" or in_prompt == moved


def test_everything_else_is_the_tasks_own(chat_tokenizer):
    inner = Made([EXAMPLE, spd.Example("q", "a")])
    task = ChatTask(inner, chat_tokenizer("headed", True))
    for name in ("name", "max_new_tokens", "calibration_size", "test_size", "stop", "metric", "runs_code", "sub_tasks"):
        assert getattr(task, name) == getattr(inner, name)
    with pytest.raises(AttributeError, match="no_such"):
        _ = task.no_such
    assert copy.copy(task).name == "made"
    questions = task.test()
    assert questions[1].prompt != "q"
    assert questions[1].group == "group"
    assert task.is_correct("qa", questions[1]), "the task sees the question that it knows"
    assert not task.is_correct(questions[1].prompt + "a", questions[1])
    assert task.judge(["qa", "qa"], questions) == [None, True]
    assert task.is_correct("qa", Question("q", "a"))


@pytest.mark.parametrize("name", ["words", "choice", "code"])
def test_generated_tasks_are_judged_as_without_the_template(name, chat_tokenizer):
    inner = spd.load_task(name)
    task = ChatTask(inner, chat_tokenizer("headed", True))
    plain = inner.questions("test")[:20]
    marker = "#### " if name == "words" else ""
    answers = [marker + question.reference.split("\n")[0] for question in plain]
    assert task.judge(answers, task.test()[:20]) == inner.judge(answers, plain) == [True] * 20
    for wrapped, example in zip(task.calibration(), inner.calibration(), strict=True):
        assert spanned(wrapped) == spanned(example)


def test_what_the_template_takes_is_handed_on(chat_tokenizer):
    tokenizer = chat_tokenizer("turned", False)
    (prompt,) = ChatTask(Made([EXAMPLE]), tokenizer, no_thinking=True).training_prompts()
    assert prompt.endswith("<|open|>assistant\n<|none|>")
    (example,) = ChatTask(Made([EXAMPLE]), tokenizer, no_thinking=True).calibration()
    assert example.completion == EXAMPLE.completion


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "it has no chat template"),
        ("{{ messages[0]['role'] }}", "leaves out what the user says"),
        ("{{ messages[0]['content'] | replace('+', 'plus') }}", "alters the prompt 'Question: 2"),
        ("{{ messages[0]['content'] }}{% if '?' in messages[0]['content'] %}?{% endif %}", "alters the prompt"),
        ("{{ raise_exception('no user turns here') }}", r"fails \(no user turns here\)"),
        ("{% if %}", r"chat template fails \("),
        ({"tool_use": TURNED}, r"chat template fails \(This model has multiple chat templates"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(template, message, chat_tokenizer):
    tokenizer = chat_tokenizer("turned", False)
    tokenizer.chat_template = template
    with pytest.raises(spd.InputError, match=f"tokenizer: .*{message}"):
        ChatTask(Made([EXAMPLE]), tokenizer).calibration()


def test_the_method_runs_on_a_chat_task(chat_tokenizer, make_model, examples):
    tokenizer = chat_tokenizer("headed", True)
    model = make_model("qwen3", vocab_size=len(tokenizer))
    task = ChatTask(Made(examples[:6]), tokenizer)
    subspace = spd.calibrate(model, tokenizer, task.calibration(), progress=False)
    assert subspace.provenance["examples"] == 6
    with spd.attach(model, subspace):
        completions = spd.generate(model, tokenizer, task.training_prompts(), max_new_tokens=4, progress=False)
    assert [each.prompt for each in completions] == task.training_prompts()
