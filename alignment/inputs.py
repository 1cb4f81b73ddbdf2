"""What a config names, looked at before anything is trained: a typo must not cost a trained reward model.

The prompts and the policy are checked where they are prepared; a reward server is asked when it is first needed.
"""

from alignment.config import Config
from alignment.embedded import reward_model_folder
from alignment.preferences import read_pairs
from alignment.preparation import cache_folder


def check_inputs(config: Config) -> None:
    """Raise ConfigError, DataError or ModelError where the reward model's or the judge's inputs cannot be used."""
    cache, reward, judge = cache_folder(config), config.reward, config.judge
    if reward.url is None and not reward.version:
        _check_reward_model(config)
        for source in filter(None, (reward.train_pairs, reward.held_out_pairs)):
            read_pairs(source, cache, limit=1)
    for source in (judge.train_pairs, judge.held_out_pairs):
        read_pairs(source, cache, limit=1)


def _check_reward_model(config: Config) -> None:
    from models.reward_export import check_length
    from models.reward_model import load_reader, render

    reward = config.reward
    render(reward.template, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    model_config, tokenizer = load_reader(str(reward_model_folder(reward.model, cache_folder(config))))
    check_length(model_config, tokenizer, reward.max_tokens)
