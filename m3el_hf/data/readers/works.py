"""BibTeX of the works that the sources come from."""

from __future__ import annotations

M3EL = """@misc{m3el,
  title = {$M^3EL$: A Multi-task Multi-topic Dataset for Multi-modal Entity Linking},
  year = {2024},
  eprint = {2410.18096},
  archivePrefix = {arXiv},
}"""

MATCHING_NETWORK = """@misc{hu2024multilevel,
  title = {Multi-level Matching Network for Multimodal Entity Linking},
  author = {Hu, Zhiwei and Guti{\\'e}rrez-Basulto, V{\\'i}ctor and Li, Ru and Pan, Jeff Z.},
  year = {2024},
  eprint = {2412.10440},
  archivePrefix = {arXiv},
}"""

MIMIC = """@inproceedings{luo2023multi,
  title = {Multi-Grained Multimodal Interaction Network for Entity Linking},
  author = {Luo, Pengfei and Xu, Tong and Wu, Shiwei and Zhu, Chen and Xu, Linli and Chen, Enhong},
  booktitle = {Proceedings of the 29th ACM SIGKDD Conference on Knowledge Discovery and Data Mining},
  year = {2023},
  eprint = {2307.09721},
  archivePrefix = {arXiv},
}"""

MELBENCH = """@misc{melbench,
  title = {Multimodal Entity Linking Datasets Benchmark},
  year = {2021},
  howpublished = {\\url{https://github.com/seukgcode/MELBench}},
}"""

WIKIDIVERSE = """@inproceedings{wang2022wikidiverse,
  title = {WikiDiverse: A Multimodal Entity Linking Dataset with Diversified Contextual Topics and Entity Types},
  author = {Wang, Xuwu and Tian, Junfeng and Gui, Min and Li, Zhixu and Wang, Rui and Yan, Ming and Chen, Lihan and
    Xiao, Yanghua},
  booktitle = {ACL},
  year = {2022},
}"""
