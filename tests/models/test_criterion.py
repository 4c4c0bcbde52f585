"""Our criteria against the library's: the same matches, losses and gradients of all that a network puts out."""

from __future__ import annotations


