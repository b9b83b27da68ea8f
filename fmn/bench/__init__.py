"""ConceptBench: is the concept gone, is the rest still there, how robust, at what cost."""
