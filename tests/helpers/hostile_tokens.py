"""Token texts that would be code, markup or spoofing if a page took them as such."""

from __future__ import annotations

from fastsd.evaluation.localisation import Localisation, Region

HOSTILE = (
    "<script>alert(1)</script></template></td></table>]]><!--&lt;&#13;&amp;\r\n\r\u202eevil\u202c"
    "\u2028\0{{7*7}}\U0001f469\u200d\U0001f467é" + "w" * 300 + "\n\n"
)


WHERE = {
    "critique": Localisation(
        before=Region(10, 1.0, 0.5, 4), at=Region(4, 6.0, 5.0, 3), wrong_responses=1, peak=5.0
    )
}


def chunks(text, size=3):
    return [text[at : at + size] for at in range(0, len(text), size)]
