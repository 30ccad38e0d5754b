package cluster

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// Program is the path of one of them.
func (c *Cluster) Program(name string) string { return c.program(name) }

// Install puts another program in the place of one, as packages do it: what runs runs on.
func (c *Cluster) Install(name, program string) error {
	fresh := c.program(name) + ".new"
	if err := copyProgram(program, fresh); err != nil {
		return fmt.Errorf("install %s: %w", name, err)
	}
	if err := os.Rename(fresh, c.program(name)); err != nil {
		return fmt.Errorf("install %s: %w", name, errors.Join(err, os.Remove(fresh)))
	}
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) { // it was the same file already
		return fmt.Errorf("install %s: %w", name, err)
	}
	return nil
}
