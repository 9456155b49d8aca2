"""An OpenAI-compatible server over the engine: `qvgpt serve`."""
