"""Operations of other projects, found lazily."""
