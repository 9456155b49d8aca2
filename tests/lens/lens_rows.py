"""What the model of these tests learns, and what its pages show."""

EVIL = "</script><img src=x onerror=\"window.hacked=1\"><!--<script>{{data}} & 'q'"
ROWS = [
    {"prompt": "a", "completion": "好", "reward": 1.0},
    {"prompt": "a", "completion": "no", "reward": 0.0},
    {"prompt": "b", "completions": ["好 e\u0301 👩‍👧\n", "no\n\n" + EVIL], "rewards": [1.0, 0.0]},
    {"prompt": EVIL, "completion": "no 好", "reward": 0.25},
]
DIALOGUE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "好"}]
