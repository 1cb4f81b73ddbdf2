"""Fixtures that several test files share."""

from reward_fixtures import served_reward_model

__all__ = ["served_reward_model"]
