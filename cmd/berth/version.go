package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/berth-run/berth/internal/version"
)

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Say which berth this is",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "berth", version.String())
			return err
		},
	}
}
