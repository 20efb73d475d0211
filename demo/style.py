"""The page's style, and the few lines of script and headers: nothing from elsewhere."""

from __future__ import annotations

import gradio as gr

__all__ = ["CSS", "HEAD", "HEADERS", "theme"]

# Gradio's own bold face of this font lacks the letters; the 700 weight beside it has them.
FONT = [gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif"]

CSS = """
:root { --chat: max(14rem, calc(100dvh - 25.5rem));
  --quiet: var(--neutral-600); --bad: #b91c1c; --good: #166534;
  --color-accent: var(--primary-600);
  --pale: #ffffff; --full: #6ecd8c; --on-heat: #111827;
  --keyword: #6d28d9; --string: #166534; --number: #9a3412; --name: #1d4ed8; }
.dark { --quiet: var(--neutral-300); --bad: #fca5a5; --good: #86efac;
  --color-accent: var(--primary-400);
  --pale: #1e293b; --full: #166534; --on-heat: #f8fafc;
  --keyword: #c4b5fd; --string: #86efac; --number: #fdba74; --name: #93c5fd; }
.gradio-container { width: 100%; max-width: 1680px !important; margin: 0 auto !important; }
#head { align-items: center; }
#head > * { padding: 0; }
#title h1 { font-size: 1.35rem; margin: 0; letter-spacing: -.01em; }
#status p { margin: 0; font-size: .9rem; color: var(--quiet); overflow-wrap: anywhere; }
#status p::before { content: ""; display: inline-block; width: .6em; height: .6em;
  margin-right: .5em; border-radius: 50%; background: #16a34a; }
#status p.down { color: var(--bad); }
#status p.down::before { background: currentColor; }
/* Gradio hides what reaches out of its box, and nothing sticks in such a box. */
.gradio-container { overflow: visible !important; overflow-x: clip !important; }
:focus-visible { outline: 2px solid var(--color-accent) !important; outline-offset: 2px; }
/* Gradio leaves the list of a box open when Tab goes on to the next. */
.block:not(:focus-within) .options:has([role=option]) { display: none !important; }
#bar .block { padding: .3rem .8rem; }
#bar .form { align-items: center; background: var(--block-background-fill); }
#count { display: flex; flex-flow: row wrap; align-items: center; gap: .2rem .8rem; }
#count > :first-child { margin: 0; }
#columns > .column { gap: .5rem; }
[id^=figures-] { padding: 0; }
[id^=figures-]:not(:has(.figures)) { display: none; }
/* The name and the bin of a chat stand above what scrolls. */
[id^=chat-] .bubble-wrap { margin-top: 1.8rem; height: calc(100% - 1.8rem); padding-top: 0; }
[id^=chat-] .placeholder-content { justify-content: start; }
[id^=difference-] > .container { max-height: 11rem; overflow-y: auto; }
[id^=difference-] :is(.textfield, .textspan, .text) { overflow-wrap: break-word;
  word-break: normal; }
:is(#columns, #panels) :is(button, input, textarea, a) { scroll-margin-bottom: 9rem; }
#panels { align-items: start; flex-wrap: wrap; }
#panels > :has(> button.open) { flex: 1 1 100%; }
#dock { position: sticky; bottom: 0; z-index: 40; gap: .4rem; padding: .5rem 0;
  background: var(--body-background-fill); }
#ask { align-items: end; gap: .5rem; }
#ask button { min-width: 0 !important; flex-basis: 4rem; }
#examples { display: flex; align-items: center; gap: .6rem; }
#examples .label { margin: 0; flex: none; }
#examples > .gallery { flex-wrap: nowrap; overflow-x: auto; padding: 3px; scrollbar-width: thin; }
#examples button { flex: none; }
#examples button div { white-space: nowrap !important; }
:is(#share-curl, #share-python) textarea { font-family: var(--font-mono); font-size: .85rem; }
@media (max-width: 640px) {
  :root { --chat: max(14rem, 38dvh); }
  #head { flex-direction: column; align-items: start; gap: 0; }
  .gradio-container > main { padding-inline: .9rem; }
  #bar .form, #mix .form { flex-direction: column; align-items: start; }
}
.message pre, .message pre code { white-space: pre-wrap !important; overflow-wrap: anywhere; }
.message-wrap .prose.chatbot.md { opacity: 1 !important; }
.message .token { color: inherit !important; }
.message .token.comment { color: var(--quiet) !important; }
.message .token:is(.keyword, .decorator, .important) { color: var(--keyword) !important; }
.message .token:is(.string, .char, .attr-value) { color: var(--string) !important; }
.message .token:is(.number, .boolean, .attr-name) { color: var(--number) !important; }
.message .token:is(.property, .tag, .selector) { color: var(--bad) !important; }
.message .token:is(.function, .class-name, .builtin) { color: var(--name) !important; }
.message td, .message th { overflow-wrap: anywhere; }
.placeholder-content, .placeholder { padding: 0 1rem; text-align: center; }
.figures p { margin: 0; font-size: .8rem; color: var(--quiet); overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; }
p.error, .figures p.error { color: var(--bad); overflow-wrap: anywhere; margin: .25rem 0 0; }
p.done { color: var(--good); }
p.notice, p.count { color: var(--quiet); margin: .2rem 0; }
.cards { display: grid; gap: .9rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.cards article { display: flex; flex-direction: column; gap: .4rem; min-width: 0; padding: .9rem;
  background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
  border-radius: 8px; }
.cards header { display: flex; flex-wrap: wrap; gap: .4rem; align-items: baseline; }
.cards h3 { margin: 0; font-size: 1rem; overflow-wrap: anywhere; }
.cards p { margin: 0; overflow-wrap: anywhere; }
.cards .badge { font-size: .75rem; padding: 0 .5em; border-radius: 1em; color: var(--quiet);
  border: 1px solid currentColor; }
.cards .badge.resident, .cards .badge.folded { color: var(--good); }
.cards .badge.refused { color: var(--bad); }
.cards dl { margin: 0; font-size: .85rem; }
.cards dl div { display: flex; gap: .6em; }
.cards dt { color: var(--quiet); min-width: 7.5em; flex: none; }
.cards dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
.cards a { align-self: start; padding: 0; margin: 0; }
.cards a, .cards summary { color: var(--link-text-color); text-decoration: underline;
  font-size: .9rem; cursor: pointer; }
.figure-table { overflow-x: auto; }
.figure-table table { border-collapse: collapse; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
.figure-table caption { text-align: left; color: var(--quiet); padding: .3rem 0;
  position: sticky; left: 0; width: min(100%, calc(100vw - 5rem)); }
.figure-table th, .figure-table td { padding: .3rem .6rem; text-align: left; vertical-align: top;
  border: 1px solid var(--border-color-primary); overflow-wrap: break-word; }
.figure-table .heat { text-align: right; color: var(--on-heat);
  background: color-mix(in srgb, var(--full) var(--heat), var(--pale)); }
.figure-table.wide table { width: 100%; }
.figure-table.wide :is(th, td) { min-width: 8rem; }
.figure-table.wide :is(th, td):last-child { min-width: 4rem; }
.figure-table .scale { display: flex; max-width: 24rem; margin-top: .3rem; font-size: .8rem; }
.figure-table .scale span { flex: 1; padding: 0 .4rem; }
.figure-table.layers table { width: 100%; font-size: .8rem; line-height: 1.25; }
.figure-table.layers :is(th, td) { padding: .1rem .3rem; text-align: right; white-space: nowrap; }
/* Gradio gives a plot the height of its box, but the label above it takes some. */
:is(#front, #speed, #traffic) { box-sizing: content-box; overflow: visible !important;
  padding: .5rem .5rem 2.2rem; width: calc(100% - 1rem - 2px); }
.numbers { display: grid; gap: .6rem; margin: 0;
  grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
.numbers div { display: flex; flex-direction: column-reverse; padding: .6rem .8rem;
  border: 1px solid var(--border-color-primary); border-radius: 8px; }
.numbers dt { color: var(--quiet); font-size: .8rem; }
.numbers dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
"""

HEAD = """<meta name="color-scheme" content="light dark">
<script>document.addEventListener("keydown", (event) => {
  const stop = document.querySelector("#stop");
  if (event.key === "Escape" && stop && !stop.disabled) stop.click();
});</script>"""

# Behind Gradio's sanitiser, a second wall: whatever a model writes, the browser asks no other host.
HEADERS = {
    "Content-Security-Policy": "; ".join(
        [
            "default-src 'self'",
            # Gradio's own page starts by a script within it, and its plots compile theirs.
            "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data: blob:",
            "font-src 'self' data:",
            "connect-src 'self' data: blob:",
            "worker-src 'self' blob:",
            "frame-src 'none'",
            "object-src 'none'",
            "base-uri 'self'",
            "form-action 'self'",
            "frame-ancestors 'self'",
        ]
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def theme() -> gr.themes.Base:
    """Return Gradio's theme with a contrast of 4.5 to 1 where its own has less."""
    return gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=FONT).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_200",
        input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_300",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_cancel_background_fill="#b91c1c",
        button_cancel_background_fill_hover="#991b1b",
        button_cancel_background_fill_dark="#b91c1c",
    )
