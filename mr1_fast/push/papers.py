"""The papers that a model card cites: that of GRPO-D, and that of another algorithm if one ran."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """An algorithm's name as it is written, and its paper on arXiv."""

    algorithm: str
    key: str
    title: str
    authors: str
    arxiv: str

    @property
    def url(self) -> str:
        """The paper's page."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    def bibtex(self) -> str:
        """Return the paper's BibTeX entry."""
        fields = {
            "title": f"{{{self.title}}}",
            "author": self.authors,
            "year": f"20{self.arxiv[:2]}",
            "eprint": self.arxiv,
            "archivePrefix": "arXiv",
            "url": self.url,
        }
        lines = "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items())
        return f"@misc{{{self.key},\n{lines}}}"


OTHINK = Paper(
    "GRPO-D",
    "liu2025othinkmr1",
    "OThink-MR1: Stimulating multimodal generalized reasoning capabilities via dynamic "
    "reinforcement learning",
    "Liu, Zhiyuan and Zhang, Yuting and Liu, Feng and Zhang, Changwang and Sun, Ying and Wang, Jun",
    "2503.16081",
)

PAPERS = {
    "grpo-d": OTHINK,
    "grpo": Paper(
        "GRPO",
        "shao2024deepseekmath",
        "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        "Shao, Zhihong and others",
        "2402.03300",
    ),
    "dr-grpo": Paper(
        "Dr. GRPO",
        "liu2025understanding",
        "Understanding R1-Zero-Like Training: A Critical Perspective",
        "Liu, Zichen and others",
        "2503.20783",
    ),
    "dapo": Paper(
        "DAPO",
        "yu2025dapo",
        "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
        "Yu, Qiying and others",
        "2503.14476",
    ),
    "gspo": Paper(
        "GSPO",
        "zheng2025gspo",
        "Group Sequence Policy Optimization",
        "Zheng, Chujie and others",
        "2507.18071",
    ),
    "cispo": Paper(
        "CISPO",
        "minimax2025m1",
        "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention",
        "MiniMax and others",
        "2506.13585",
    ),
}
"""The paper of each algorithm but supervised fine-tuning, by the values of --algo."""
