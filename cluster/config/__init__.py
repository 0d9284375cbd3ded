"""What the user wrote: one YAML, validated whole, every error at once.

In the order a file passes through: ``yaml_tree`` (text to plain data, with places), ``sections`` (key by key into the
types of ``schema``, ``nodes``, ``gateway``, ``models``, ``jobs``, ``jobs_train``, ``jobs_optimizers``, ``sources``;
``wording`` puts errors in plain words), ``relations`` and its parts ``model_relations``, ``job_relations``,
``train_relations`` (rules between keys), ``findings`` (mistakes become Problems in file order).
``load`` is the way in: ``load_config`` and ``load_text``. ``base`` holds what all sections are made of, ``job_paths``
finds settings of a job by their dotted path.
"""
