"""The judge of a run: trained on data of its own, measured, saved in the run folder; reported, it never selects."""

from collections.abc import Callable, Sequence
from pathlib import Path

from alignment.config import Config
from alignment.preferences import conversation, read_pairs
from alignment.preparation import cache_folder
from alignment.types import JudgeRef, PreferencePair


def prepare_judge(config: Config, folder: Path, on_note: Callable[[str], None]) -> JudgeRef:
    """Train the judge, measure it, save it in the run folder."""
    from models.judge import pairwise_accuracy, train_judge

    judge, cache = config.judge, cache_folder(config)
    pairs, _ = read_pairs(judge.train_pairs, cache, limit=judge.num_train_pairs)
    held_out, _ = read_pairs(judge.held_out_pairs, cache, limit=config.reward_training.num_held_out)
    trained = train_judge(_plain(pairs, "chosen"), _plain(pairs, "rejected"), seed=config.seed)
    accuracy = pairwise_accuracy(trained, _plain(held_out, "chosen"), _plain(held_out, "rejected"))
    trained.save(folder)
    on_note(f"judge: trained on {len(pairs)} pairs of {judge.train_pairs}, held-out accuracy {accuracy:.3f}")
    name = f"n-gram judge trained on {judge.train_pairs}"
    return JudgeRef(name=name, uri=str(folder), accuracy=accuracy, details={"held_out": judge.held_out_pairs})


def _plain(pairs: Sequence[PreferencePair], side: str) -> list[str]:
    from models.judge import judge_text

    return [judge_text(conversation(p.prompt, getattr(p, side))) for p in pairs]
