"""Tasks for lm-evaluation-harness on local records, with this package's prompts and rules.

In a folder with `gsm8k/test.jsonl` and so on, on a checkpoint that `spd export` wrote:

    lm_eval --model hf --model_args pretrained=FOLDER --include_path $(python -m spd.lm_eval) --tasks spd_gsm8k

There are spd_gsm8k, spd_svamp, spd_bbh (six sub-tasks), spd_mmlu (likelihood of the letters) and spd_codealpaca
(likelihood of the output).
"""
