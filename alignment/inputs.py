"""What a config names, looked at before anything is trained: a typo must not cost a trained reward model.

The prompts and the policy are checked where they are prepared; a reward server is asked when it is first needed.
"""

from alignment.config import Config
from alignment.embedded import reward_model_folder
from alignment.preferences import read_pairs
from alignment.preparation import cache_folder
from alignment.ratings import read_ratings


def check_inputs(config: Config) -> None:
    """Raise ConfigError, DataError or ModelError where the reward model's or the judge's inputs cannot be used."""
    if config.reward.url is None and not config.reward.version:
        check_reward_inputs(config)
    for source in (config.judge.train_pairs, config.judge.held_out_pairs):
        read_pairs(source, cache_folder(config), limit=1)


def check_reward_inputs(config: Config) -> None:
    """Raise ConfigError, DataError or ModelError where a reward model cannot be trained from this config."""
    cache, own = cache_folder(config), config.reward_training
    _check_reward_model(config)
    for source in filter(None, (own.held_out, *own.validation, *own.also_measure)):
        read_pairs(source, cache, limit=1)
    if own.train and own.loss == "regression":
        read_ratings(own.train, cache, own.attributes, limit=1)
    elif own.train:
        read_pairs(own.train, cache, limit=1)


def _check_reward_model(config: Config) -> None:
    from models.onnx_export import check_onnx
    from models.reward_export import check_length
    from models.reward_model import load_reader, render

    reward = config.reward
    render(reward.template, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    model_config, tokenizer = load_reader(str(reward_model_folder(reward.model, cache_folder(config))))
    check_length(model_config, tokenizer, reward.max_tokens)
    if reward.runtime == "onnxruntime":
        check_onnx(model_config)
