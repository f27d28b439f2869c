"""options.py: the options of `evaluate.py run`, `score` and `table`."""

import argparse

from benchmarks.suite import BENCHMARKS


def add_run(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "run", help="write a model's responses to a benchmark; the same command resumes"
    )
    option = parser.add_argument
    option(
        "--model",
        required=True,
        help="a Hugging Face directory or hub id, such as RUN_DIR/final; or toy, its warm start",
    )
    option("--benchmark", required=True, metavar="NAME", help=", ".join(BENCHMARKS))
    option("--data", metavar="FILE.tsv", help="VLMEvalKit's TSV file; the toy has none")
    option(
        "--out", required=True, metavar="DIR", help="folder of this run: run.json, responses.jsonl"
    )
    option(
        "--prompt",
        choices=("benchmark", "train"),
        help="the dataset's own prompt (default; the toy's is train), "
        "or that with the instruction of training around it",
    )
    option(
        "--template",
        help="of --prompt train; by default that of the training run, "
        "or of config.yaml for a model that train.py did not make",
    )
    option(
        "--image-root",
        metavar="DIR",
        help="folder of a file with image paths instead of images, by default the file's",
    )
    option("--max-new-tokens", type=int, help="default 2048; toy 128")
    option(
        "--sample",
        type=int,
        default=1,
        metavar="K",
        help="responses to each row, for pass@k; needs --temperature",
    )
    option("--temperature", type=float, default=0.0, help="0 decodes greedily")
    option("--seed", type=int, default=0, help="of sampling")
    option(
        "--min-pixels",
        type=int,
        help="smaller images are enlarged to this area; default 1003520, as VLMEvalKit "
        "does for Qwen2.5-VL; toy: the model's own",
    )
    option(
        "--max-pixels",
        type=int,
        help="larger images are shrunk to this area; default 12845056; toy: the model's own",
    )
    option(
        "--max-cache-tokens",
        type=int,
        default=131072,
        help="prompt and response tokens in the cache at once",
    )
    option(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto is bfloat16 on a GPU",
    )
    return parser


def scoring_options() -> argparse.ArgumentParser:
    """The options that `score` and `table` share."""
    parser = argparse.ArgumentParser(add_help=False)
    option = parser.add_argument
    option(
        "--mode",
        choices=("raw", "final"),
        default="final",
        help="what the rules read: the whole response, or its final answer (default)",
    )
    option(
        "--judge",
        metavar="FILE.py:function",
        help="asked about what the rules cannot settle, as function(response, "
        "answer, row) -> the response's answer, or True or False",
    )
    option("--allow-missing", action="store_true", help="missing responses are wrong, not an error")
    option(
        "--answer-is",
        action="store_true",
        help="match options with VLMEvalKit's rule of 2026-06-17, too",
    )
    return parser


def add_score(commands, rules: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "score", parents=[rules], help="print the score of responses as one JSON object"
    )
    option = parser.add_argument
    option("--benchmark", required=True, metavar="NAME", help=", ".join(BENCHMARKS))
    option("--data", metavar="FILE.tsv")
    option(
        "--responses", required=True, metavar="FILE.jsonl", help='lines {"index": …, "response": …}'
    )
    return parser


def add_table(commands, rules: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser = commands.add_parser("table", parents=[rules], help="print runs side by side")
    parser.add_argument("folder", nargs="+", metavar="DIR", help="--out of a run")
    return parser
