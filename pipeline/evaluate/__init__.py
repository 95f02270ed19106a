"""An artifact is reloaded in a fresh process, proven, measured and judged."""
