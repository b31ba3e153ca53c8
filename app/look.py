"""How the page looks: Gradio's theme and a little CSS. Nothing here is called from another machine.

Stands beside `app.ui`, whose element names it styles; `app.__main__` hands both to Gradio's launch.
"""

from __future__ import annotations

import gradio as gr

# Fonts of the visitor's machine: a page on 127.0.0.1 should not call a font server.
THEME = gr.themes.Soft(
    primary_hue="teal",
    secondary_hue="teal",
    neutral_hue="slate",
    font=["Inter", "ui-sans-serif", "system-ui", "sans-serif"],
    font_mono=["ui-monospace", "SFMono-Regular", "monospace"],
).set(
    body_background_fill="*neutral_50",
    body_text_color_subdued="*neutral_500",
    block_title_background_fill="transparent",
    block_title_background_fill_dark="transparent",
    block_title_padding="0",
    block_title_text_color="*body_text_color",
    block_title_text_color_dark="*body_text_color",
    block_title_text_weight="500",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    button_primary_background_fill_dark="*primary_600",
    button_primary_background_fill_hover_dark="*primary_700",
    button_secondary_background_fill_hover_dark="*neutral_600",
)

CSS = """
.lily-head h1 { font-size: 1.5rem; font-weight: 600; margin: 0; }
.lily-head p, .lily-note, .lily-note * { color: var(--body-text-color-subdued); font-size: .9rem; line-height: 1.5; }
.lily-head b, .lily-note b { color: var(--body-text-color); font-weight: 500; }
.lily-note .fault { color: var(--error-text-color); overflow-wrap: anywhere; }
.lily-card, .lily-card .styler, .lily-card .form { background: var(--block-background-fill) !important; }
#refresh { align-self: end; margin: 0 .6rem .7rem 0; }
.dark .lily-note .fault { color: #fca5a5; }
#status { min-height: 3.4rem; align-content: center; }
/* Gradio writes its step counter over the bar; the description beside it says the same. */
#status .progress-text:has(+ .progress-level) { display: none; }
#status .progress-level-inner { font-family: var(--font); font-variant-numeric: tabular-nums; }
#gallery .grid-wrap { min-height: 0; max-height: none; }
"""
