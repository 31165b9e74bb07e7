"""`zreward`: the pocket world's own student, which ships."""

from backend import Backend

BACKEND = Backend("zreward", lambda folder: {})
